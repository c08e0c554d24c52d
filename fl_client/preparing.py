"""What `fl_client prepare` does, and `fl_client ingest` at its end: the frozen backbone runs once over the site's images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fl_client.site import SiteFile, cache_folder_of, site_slices
from icmoe.backbone import load_backbone
from icmoe.device import available_device
from icmoe.features import FeatureCache
from icmoe.prepare import encode_slices
from icmoe.study import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Features of one study.

    Parameters
    ----------
    study
        Its name.
    images
        Usable images.
    encoded
        Views that the cache did not hold before.
    """

    study: str
    images: int
    encoded: int


def prepare_site(
    path: Path, settings: SiteFile, studies: tuple[Study, ...], *, on_progress: Callable[[str, int, int], None]
) -> list[Prepared]:
    """Encode what the cache does not hold yet, study by study.

    Parameters
    ----------
    path, settings, studies
        From `read_site_file`.
    on_progress
        Called with the step's name, how much is done and how much there is.

    Raises
    ------
    IcmoeError
        As `site_slices`; 206, 207 for the backbone's weights, 211 for the device.
    """
    done = []
    for study in studies:
        slices = site_slices(path, settings, study)
        backbone = load_backbone(
            study.backbone.name,
            image_size=study.backbone.image_size,
            checkpoint=path.parent / settings.checkpoint if settings.checkpoint else None,
            expected_digest=study.backbone.digest,
            device=available_device(settings.device),
        )
        cache = FeatureCache.of(cache_folder_of(path, settings), study)
        step = f"encode {study.name}"
        encoded = encode_slices(slices, study, backbone, cache, on_progress=lambda n, of, step=step: on_progress(step, n, of))  # type: ignore[misc]
        done.append(Prepared(study=study.name, images=len(slices), encoded=encoded))
    return done
