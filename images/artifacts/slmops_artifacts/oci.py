"""Artifacts in an OCI registry, laid out as CNCF ModelPack: one raw layer per file.

Our own manifest travels as one annotation, because ModelPack's config admits no extra fields.
Nothing that changes between two equal pushes goes in, so equal content has an equal digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from .download import Wanted, fetch
from .errors import ArtifactError, from_os
from .files import CHUNK, Choose, Entry, Progress, Ticker, canonical, check_paths, list_files
from .formats import Role, check_content, check_files, detect_format
from .model import Manifest
from .registry_auth import RegistryAuth, plain_http
from .sent import Sent
from .staging import Staging
from .transfer import Http
from .trust import trusted
from .upload import upload
from .uris import OciRef

ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_ACCEPT = (
    MANIFEST_TYPE,
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
"""Of these only the first may be an artifact: without the others, a registry calls what they are about absent."""
LAYER_TYPES: dict[Role, str] = {
    "weight": "application/vnd.cncf.model.weight.v1.raw",
    "config": "application/vnd.cncf.model.weight.config.v1.raw",
    "dataset": "application/vnd.cncf.model.dataset.v1.raw",
    "doc": "application/vnd.cncf.model.doc.v1.raw",
}
FILEPATH = "org.cncf.model.filepath"
OURS = "dev.slmops.manifest"

_MAX_DOCUMENT = 4 << 20
_MAX_LAYER = 1 << 44
_PUSHES = 3
"""How often a registry may lose what we have just sent before we give up."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def resolve(ref: OciRef, secret: Mapping[str, Any] | None, patience: float | None) -> str | None:
    """Return the digest that the reference means now."""
    found = _Repository(ref, secret, "pull", patience).manifest()
    return found[0] if found else None


def read_manifest(ref: OciRef, secret: Mapping[str, Any] | None, patience: float | None) -> Manifest | None:
    """Return the manifest behind the reference, by one request."""
    found = _Repository(ref, secret, "pull", patience).manifest()
    if found is None:
        return None
    return _manifest(found[0], found[1], _layers(found[1], str(ref)), str(ref))


def pull(
    ref: OciRef,
    dest: Path,
    secret: Mapping[str, Any] | None,
    progress: Progress | None,
    patience: float | None,
    choose: Choose | None = None,
) -> Manifest:
    """Fetch every layer, or those chosen, into `dest`."""
    repository = _Repository(ref, secret, "pull", patience)
    found = repository.manifest()
    if found is None:
        raise ArtifactError("SourceNotFound", f"{ref} does not exist in the registry. Check repository and tag.")
    digest, document = found
    layers = _layers(document, str(ref))
    manifest = _manifest(digest, document, layers, str(ref))
    part = None if choose is None else frozenset(choose([layer.path for layer in layers]))
    layers = [layer for layer in layers if part is None or layer.path in part]
    ticker = Ticker(sum(layer.size for layer in layers), progress)
    with Staging(dest, digest, part=part) as staging:
        if staging.done() is not None:
            ticker.add(ticker.total)
            return manifest
        staging.reserve(ticker.total)
        entries = []
        for layer in layers:
            wanted = Wanted(layer.path, layer.size, repository.blob(f"sha256:{layer.sha256}"), layer.sha256)
            entries.append(fetch(repository.http, wanted, staging, ticker.add))
            check_content(layer.path, staging.existing(layer.path) or dest, str(ref))
        staging.publish(manifest, entries)
    return manifest


def push(
    src: Path,
    ref: OciRef,
    manifest: Manifest,
    secret: Mapping[str, Any] | None,
    progress: Progress | None,
    patience: float | None,
    sent: Sent,
) -> tuple[str, Manifest]:
    """Upload what the registry does not have yet, then the manifest."""
    if ref.digest:
        raise ArtifactError("BadUri", f"{ref} names a digest. Push to a tag; the digest follows from the content.")
    files = list_files(src, str(src))
    verdicts = check_files(files, str(src))
    for path, file in files.items():
        check_content(path, file, str(src))
    entries = sent.entries(files)
    manifest = manifest.completed(
        digest="",
        format=manifest.format or detect_format(verdicts),
        size_bytes=sum(entry.size for entry in entries),
    )
    config = _config(manifest, entries)
    document = canonical(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": _descriptor(CONFIG_TYPE, hashlib.sha256(config).hexdigest(), len(config)),
            "layers": [
                _descriptor(LAYER_TYPES[verdicts[entry.path].role or "doc"], entry.sha256, entry.size)
                | {"annotations": {FILEPATH: entry.path}}
                for entry in entries
            ],
            "annotations": {OURS: canonical(manifest.model_dump(mode="json", exclude={"digest"})).decode()},
        }
    )
    if len(document) > _MAX_DOCUMENT:
        raise ArtifactError("UnsupportedFormat", f"The manifest for {ref} is over 4 MiB. Shorten recipe or metrics.")
    repository = _Repository(ref, secret, "pull,push", patience)
    for _ in range(_PUSHES):
        ticker = Ticker(manifest.size_bytes, progress)
        for entry in entries:
            if entry.sha256 in sent.blobs:
                ticker.add(entry.size)
            else:
                repository.put_file(files[entry.path], entry, ticker)
        repository.put_bytes(config)
        sent.blobs = frozenset()  # what it has lost all the same is found the next time
        if (digest := repository.put_manifest(document)) is not None:
            sent.blobs = frozenset(entry.sha256 for entry in entries)
            return ref.pinned(digest), manifest.model_copy(update={"digest": digest})
    raise ArtifactError("SourceUnavailable", f"{ref}: the registry lost files while they were pushed. See its log.")


def delete(ref: OciRef, secret: Mapping[str, Any] | None, patience: float | None) -> bool:
    """Remove the manifest, and with it every tag on it. The registry's garbage collection frees the files."""
    repository = _Repository(ref, secret, "pull,push,delete", patience)
    if ref.digest:
        return repository.delete(ref.digest)
    found = repository.manifest()
    return found is None or repository.delete(found[0])


class _Repository:
    """The calls of the OCI distribution API that we need, for one repository."""

    def __init__(self, ref: OciRef, secret: Mapping[str, Any] | None, actions: str, patience: float | None) -> None:
        host = "registry-1.docker.io" if ref.host in ("docker.io", "index.docker.io") else ref.host
        self._ref = ref
        self._base = httpx.URL(f"{'http' if plain_http(ref.host) else 'https'}://{host}/v2/{ref.repository}/")
        trust = trusted(secret)
        auth = RegistryAuth(self._base, host, ref.repository, actions, secret, trust)
        self.http = Http(str(ref), auth, patience, trust)

    def blob(self, digest: str) -> str:
        """Where a blob is."""
        return f"{self._base}blobs/{digest}"

    def manifest(self) -> tuple[str, dict[str, Any]] | None:
        """Digest and content of the manifest, verified; None when there is none."""
        reply = self.http.request(
            "GET",
            f"{self._base}manifests/{self._ref.reference}",
            expect=(200, 404),
            headers={"Accept": ", ".join(_ACCEPT)},
            limit=_MAX_DOCUMENT,
        )
        if reply.status == 404:
            return None
        digest = "sha256:" + hashlib.sha256(reply.body).hexdigest()
        expected = self._ref.digest or reply.headers.get("docker-content-digest", digest)
        if digest != expected:
            raise ArtifactError(
                "DigestMismatch",
                f"{self._ref}: the registry sent a manifest with the digest {digest[:19]}… instead of "
                f"{expected[:19]}…. The copy there is damaged: publish it again.",
            )
        try:
            document = json.loads(reply.body)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict) or document.get("artifactType") != ARTIFACT_TYPE:
            raise ArtifactError(
                "UnsupportedFormat",
                f"{self._ref} is not a model artifact (ModelPack) but something else, perhaps a container image. "
                "Check the URI.",
            )
        return digest, document

    def put_file(self, file: Path, entry: Entry, ticker: Ticker) -> None:
        """Upload a file unless the registry has it."""
        if self._has(entry.sha256):
            ticker.add(entry.size)
            return

        def read(offset: int, end: int) -> Iterator[bytes]:
            """Yield the bytes of the file from `offset` to `end`."""
            try:
                with file.open("rb") as stream:
                    stream.seek(offset)
                    while offset < end and (block := stream.read(min(CHUNK, end - offset))):
                        offset += len(block)
                        ticker.add(len(block))
                        yield block
            except OSError as error:
                raise from_os(error, "Reading", file) from error
            if offset < end:
                raise ArtifactError("DigestMismatch", f"{file} shrank while it was uploaded. Publish it again.")

        upload(self.http, self._base, entry, read, ticker)

    def put_bytes(self, content: bytes) -> None:
        """Upload a small blob unless the registry has it."""
        entry = Entry("config", len(content), hashlib.sha256(content).hexdigest())
        if not self._has(entry.sha256):
            upload(self.http, self._base, entry, lambda start, end: iter([content[start:end]]), Ticker(0, None))

    def put_manifest(self, document: bytes) -> str | None:
        """Publish under the tag; from here on the artifact is visible. None: the registry lacks some file of it."""
        digest = "sha256:" + hashlib.sha256(document).hexdigest()
        reply = self.http.request(
            "PUT",
            f"{self._base}manifests/{self._ref.tag or 'latest'}",
            expect=(201, 400, 404, 409, 412),
            body=lambda: document,
            headers={"Content-Type": MANIFEST_TYPE},
        )
        if reply.status != 201:
            # Its garbage collection may have run between the files and the manifest that names them.
            if b"BLOB_UNKNOWN" in reply.body:
                return None
            raise ArtifactError(
                "Refused",
                f"{self._ref}: the registry refused the manifest (HTTP {reply.status}). See its log. If it lets no tag "
                "be replaced, allow that for this repository: checkpoints are saved under one tag.",
            )
        if reply.headers.get("docker-content-digest", digest) != digest:
            raise ArtifactError("DigestMismatch", f"{self._ref}: the registry changed the manifest. Use another one.")
        return digest

    def delete(self, digest: str) -> bool:
        """Remove a manifest; False where the registry does not allow that."""
        reply = self.http.request("DELETE", f"{self._base}manifests/{digest}", expect=(200, 202, 204, 404, 405))
        return reply.status != 405

    def _has(self, sha256: str) -> bool:
        return self.http.request("HEAD", self.blob(f"sha256:{sha256}"), expect=(200, 404)).status == 200


def _descriptor(media_type: str, sha256: str, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{sha256}", "size": size}


def _config(manifest: Manifest, entries: list[Entry]) -> bytes:
    """ModelPack's own description of the model, for other tools."""
    descriptor = {
        key: manifest.annotations[key] for key in ("name", "family", "version") if manifest.annotations.get(key)
    }
    if manifest.created:
        descriptor["createdAt"] = manifest.created
    diff_ids = [f"sha256:{entry.sha256}" for entry in entries]
    return canonical(
        {
            "descriptor": descriptor,
            "config": {"format": manifest.format},
            "modelfs": {"type": "layers", "diffIds": diff_ids},
        }
    )


def _layers(document: dict[str, Any], where: str) -> list[Entry]:
    """Read the files of an artifact from a manifest that somebody else may have written."""
    entries = []
    try:
        for layer in document["layers"]:
            media, digest, size = layer["mediaType"], layer["digest"], layer["size"]
            path = (layer.get("annotations") or {}).get(FILEPATH, "")
            if media not in LAYER_TYPES.values():
                raise ArtifactError(
                    "UnsupportedFormat",
                    f"{where} holds a layer of type {str(media)[:80]!r}; only raw (not tar, not code) layers are read. "
                    "Pack it again with raw layers.",
                )
            if not _DIGEST.fullmatch(digest) or not isinstance(size, int) or not 0 <= size <= _MAX_LAYER:
                raise ValueError
            entries.append(Entry(str(path), size, digest.removeprefix("sha256:")))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ArtifactError("UnsupportedFormat", f"{where} has a malformed manifest. Publish it again.") from None
    check_paths([entry.path for entry in entries], where)
    check_files([entry.path for entry in entries], where)
    return entries


def _manifest(digest: str, document: dict[str, Any], layers: list[Entry], where: str) -> Manifest:
    """Our manifest from its annotation; artifacts of other tools get one made from what they tell."""
    text = (document.get("annotations") or {}).get(OURS)
    size = sum(entry.size for entry in layers)
    if text is None:
        verdicts = check_files([entry.path for entry in layers], where)
        data = all(verdict.role in ("dataset", "doc") for verdict in verdicts.values())
        return Manifest(
            kind="dataset" if data else "model",
            format=detect_format(verdicts),
            digest=digest,
            size_bytes=size,
        )
    try:
        return Manifest.model_validate_json(text).model_copy(update={"digest": digest, "size_bytes": size})
    except (ValidationError, ValueError):
        raise ArtifactError("UnsupportedFormat", f"{where} has a malformed manifest. Publish it again.") from None
