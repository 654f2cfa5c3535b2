"""What others have put into a real registry: other things than models, and manifests with bad intent."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import httpx
import pytest
from artifact_support import Registry

from slmops_artifacts import ArtifactError, pull, read_manifest


def test_a_container_image_is_not_a_model(registry: Registry, tmp_path: Path) -> None:
    config = b"{}"
    digest = "sha256:" + hashlib.sha256(config).hexdigest()
    start = httpx.post(f"http://{registry.host}/v2/img/blobs/uploads/")
    httpx.put(f"{start.headers['location']}&digest={digest}", content=config).raise_for_status()
    kind = "application/vnd.oci.image.manifest.v1+json"
    entry = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": 2}
    body = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": entry, "layers": []})
    httpx.put(
        f"http://{registry.host}/v2/img/manifests/v1", content=body, headers={"Content-Type": kind}
    ).raise_for_status()
    with pytest.raises(ArtifactError) as caught:
        pull(f"oci://{registry.host}/img:v1", tmp_path / "out")
    assert caught.value.reason == "UnsupportedFormat"


@pytest.mark.parametrize(
    ("kind", "list_of"),
    [
        ("application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json"),
        (
            "application/vnd.docker.distribution.manifest.list.v2+json",
            "application/vnd.docker.distribution.manifest.v2+json",
        ),
    ],
)
def test_an_image_of_several_platforms_is_there_but_no_model(registry: Registry, kind: str, list_of: str) -> None:
    config = b"{}"
    digest = "sha256:" + hashlib.sha256(config).hexdigest()
    start = httpx.post(f"http://{registry.host}/v2/img/blobs/uploads/")
    httpx.put(f"{start.headers['location']}&digest={digest}", content=config).raise_for_status()
    entry = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": digest, "size": 2}
    one = json.dumps({"schemaVersion": 2, "mediaType": list_of, "config": entry, "layers": []}).encode()
    name = "sha256:" + hashlib.sha256(one).hexdigest()
    platform = {"architecture": "amd64", "os": "linux"}
    listed = {"mediaType": list_of, "digest": name, "size": len(one), "platform": platform}
    index = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": [listed]}).encode()
    for reference, media, document in ((name, list_of, one), ("v1", kind, index)):
        httpx.put(
            f"http://{registry.host}/v2/img/manifests/{reference}", content=document, headers={"Content-Type": media}
        ).raise_for_status()
    for reference in (":v1", f"@{name}"):
        with pytest.raises(ArtifactError, match="not a model artifact") as caught:
            read_manifest(f"oci://{registry.host}/img{reference}")
        assert caught.value.reason == "UnsupportedFormat"


@pytest.mark.parametrize(
    ("path", "media"),
    [
        ("../evil.json", "application/vnd.cncf.model.weight.config.v1.raw"),
        ("/etc/evil.json", "application/vnd.cncf.model.weight.config.v1.raw"),
        ("a/../../evil.json", "application/vnd.cncf.model.weight.config.v1.raw"),
        (".slmops-complete", "application/vnd.cncf.model.weight.config.v1.raw"),
        ("", "application/vnd.cncf.model.weight.config.v1.raw"),
        ("new\nline.json", "application/vnd.cncf.model.weight.config.v1.raw"),
        ("pytorch_model.bin", "application/vnd.cncf.model.weight.v1.raw"),
        ("modeling.py", "application/vnd.cncf.model.weight.v1.raw"),
        ("model.json", "application/vnd.cncf.model.weight.v1.tar"),
        ("model.json", "application/vnd.cncf.model.code.v1.raw"),
    ],
)
def test_a_hostile_manifest_is_refused(registry: Registry, tmp_path: Path, path: str, media: str) -> None:
    data = b"{}"
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    start = httpx.post(f"http://{registry.host}/v2/evil/blobs/uploads/")
    httpx.put(f"{start.headers['location']}&digest={digest}", content=data).raise_for_status()
    kind = "application/vnd.oci.image.manifest.v1+json"
    layer = {"mediaType": media, "digest": digest, "size": 2, "annotations": {"org.cncf.model.filepath": path}}
    config = {"mediaType": "application/vnd.cncf.model.config.v1+json", "digest": digest, "size": 2}
    document = {
        "schemaVersion": 2,
        "mediaType": kind,
        "artifactType": "application/vnd.cncf.model.manifest.v1+json",
        "config": config,
        "layers": [layer],
    }
    httpx.put(
        f"http://{registry.host}/v2/evil/manifests/v1", content=json.dumps(document), headers={"Content-Type": kind}
    ).raise_for_status()
    with pytest.raises(ArtifactError) as caught:
        pull(f"oci://{registry.host}/evil:v1", tmp_path / "out" / "deep")
    assert caught.value.reason == "UnsupportedFormat"
    assert "\n" not in caught.value.message
    assert not list(tmp_path.rglob("evil.json"))
