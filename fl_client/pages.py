"""Pages of a site as HTML that stands by itself: a template of this package, every text escaped."""

from __future__ import annotations


def rendered(template: str, **values: object) -> str:
    """Return a template of this package with its values; a value that the template lacks is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # for pages only

    pages = Environment(loader=PackageLoader("fl_client", "."), autoescape=True, undefined=StrictUndefined)
    return pages.get_template(template).render(**values)
