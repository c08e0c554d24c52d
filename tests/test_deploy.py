"""What an administrator touches: it parses, it is locked down, and it names commands that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from fl_client.cli import app as fl_client
from fl_server.cli import app as fl_server
from fl_server.commands import STOPPED

DEPLOY = Path(__file__).parents[1] / "deploy"
UNITS = sorted((DEPLOY / "systemd").iterdir())
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def containers() -> dict[str, dict]:
    found = {}
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            if document["kind"] == "Deployment":
                pod = document["spec"]["template"]["spec"]
                for container in [*pod.get("initContainers", []), *pod["containers"]]:
                    found[container["name"]] = {**container, "pod": pod}
    return found


def services() -> dict[str, dict]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


@pytest.mark.parametrize("name", containers())
def test_no_pod_has_root_or_a_writable_root_file_system(name: str) -> None:
    container = containers()[name]
    locked, pod = container["securityContext"], container["pod"]
    assert locked["readOnlyRootFilesystem"] is True
    assert locked["allowPrivilegeEscalation"] is False
    assert locked["capabilities"] == {"drop": ["ALL"]}
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", services())
def test_no_compose_service_has_root_or_a_writable_root_file_system(name: str) -> None:
    service = services()[name]
    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True


def test_one_port_is_open_and_the_proxy_reaches_the_superlink_on_loopback() -> None:
    assert {name: service["ports"] for name, service in services().items() if "ports" in service} == {"superlink": ["443:8443"]}
    assert services()["proxy"]["network_mode"] == "service:superlink"
    coordinator = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "coordinator.yaml").read_text()))
    policy = next(document for document in coordinator if document["kind"] == "NetworkPolicy")["spec"]
    assert policy["ingress"] == [{"ports": [{"port": 8443, "protocol": "TCP"}]}]
    assert policy["egress"] == []
    site = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "site.yaml").read_text()))
    assert next(document for document in site if document["kind"] == "NetworkPolicy")["spec"]["ingress"] == []


def test_images_are_pinned_and_end_as_an_ordinary_user() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+/\S+)", text, flags=re.MULTILINE)
    assert re.fullmatch(r"docker\.io/library/python:3\.11\.\d+-slim-\w+", base)
    for stage in re.split(r"^FROM base AS ", text, flags=re.MULTILINE)[1:]:
        assert re.findall(r"^USER (\S+)", stage, flags=re.MULTILINE) == ["10001:10001"]
    assert not re.findall(r"image: \S+:latest|image: [^:\s]+$", (DEPLOY / "compose.yaml").read_text(), flags=re.MULTILINE)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_units_are_valid_and_confined(tmp_path: Path) -> None:
    for unit in UNITS:
        text = unit.read_text().replace("/opt/icmoe/.venv/bin", sysconfig.get_path("scripts"))
        (tmp_path / unit.name.replace("@", "@hospitalA")).write_text(text)
    paths = [path for path in tmp_path.iterdir() if shutil.which("nginx", path="/usr/sbin") or "proxy" not in path.name]
    command = ["systemd-analyze", "verify", "--man=no", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for path in paths:
        command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=25", str(path)]
        assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0, path.name


def test_a_study_that_a_person_stopped_is_not_gone_on_with_by_its_service() -> None:
    text = (DEPLOY / "systemd" / "icmoe-study@.service").read_text()
    assert re.findall(r"^RestartPreventExitStatus=(.*)$", text, re.MULTILINE) == [str(STOPPED)]
    assert STOPPED not in {0, 1, 2, 130}, "other endings of fl_server run"
    for page in ("README.md", "coordinator.md"):
        assert f"exit code {STOPPED}" in (DEPLOY / page).read_text(), page


def test_every_command_of_the_guide_and_the_units_exists() -> None:
    known = {"fl_server": set(get_command(fl_server).commands), "fl_client": set(get_command(fl_client).commands)}
    later = {
        "fl_server": {"provision", "admit", "revoke", "expiry"},
        "fl_client": {"init", "check", "it-sheet", "approve", "audit"},
    }
    texts = [path.read_text() for path in (DEPLOY / "README.md", *UNITS)]
    found = re.findall(r"(fl_server|fl_client)((?: --(?:site|config) \S+)*) ([a-z][a-z-]+)", "\n".join(texts))
    assert found
    for program, _, command in found:
        assert command in known[program] | later[program], f"{program} {command}"
