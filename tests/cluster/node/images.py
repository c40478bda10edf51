"""Images for the node: the base, the repository's own, and how they get there."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from tests.cluster.host.commands import run
from tests.cluster.host.paths import REPOSITORY, ensure_folder, lock
from tests.cluster.host.processes import Processes
from tests.cluster.host.progress import say
from tests.cluster.node import buildah
from tests.cluster.node.containers import PAUSE_IMAGE, Containerd
from tests.cluster.node.registry import ensure_registry
from tests.cluster.programs.packages import ensure_commands, require_root

BASE_PACKAGES: Final = ("python3", "python3-venv", "ca-certificates")
BASE_SUITE: Final = "bookworm"

BASE_DOCKERFILE: Final = """\
FROM scratch
ADD rootfs.tar /
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
CMD ["python3"]
"""

PAUSE_DOCKERFILE: Final = """\
FROM scratch
COPY busybox /busybox
ENTRYPOINT ["/busybox", "sleep", "infinity"]
"""

KEPT_TAGS: Final = 2
"""How many images of one name stay on disk: the one in use and the one before it."""


def ensure_base_image() -> str:
    """Return the base image's reference, bootstrapped from Debian's packages the first time."""
    recipe = " ".join([BASE_SUITE, *BASE_PACKAGES, BASE_DOCKERFILE])
    reference = f"localhost/qlora-base:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not is_built(reference):
        bootstrap(reference)
    return reference


def bootstrap(reference: str) -> None:
    """Make the base image: a minimal Debian with Python, as no registry has one to pull."""
    require_root("making the base image")
    ensure_commands("debootstrap", "buildah")
    say("making the base image with debootstrap (about a minute the first time)")
    work = buildah.HOME / "base"
    shutil.rmtree(work, ignore_errors=True)
    rootfs = ensure_folder(work / "rootfs")
    run(["debootstrap", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}", BASE_SUITE, rootfs])
    for waste in ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "var/log"):
        shutil.rmtree(rootfs / waste, ignore_errors=True)
    (rootfs / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    run(["tar", "--directory", rootfs, "--exclude=./dev/*", "--create", "--file", work / "rootfs.tar", "."])
    build_from_text(work, BASE_DOCKERFILE, reference)
    shutil.rmtree(work)


def build_image(
    target: str,
    tag: str,
    base: str | None = None,
    context: Path = REPOSITORY,
    arguments: dict[str, str] | None = None,
) -> str:
    """Build one target of the Dockerfile and return its full reference, `localhost/` in front if it names no host."""
    reference = tag if tag.startswith("localhost/") else f"localhost/{tag}"
    values = {"BASE": base or ensure_base_image(), "UV_NO_CACHE": "false", **(arguments or {})}
    # What a build has made so far looks unused until it ends, so nobody may prune meanwhile.
    with lock(buildah.HOME / "build.lock"):
        # A build that was killed leaves its container, which holds an image that could not be pruned.
        buildah.buildah("rm", "--all")
        buildah.build(context, context / "Dockerfile", reference, target=target, arguments=values)
        prune_builds(reference)
    return reference


def named_image(target: str) -> str | None:
    """Return the image that the environment names in place of a target of the repository's Dockerfile."""
    return os.environ.get(f"QLORA_TEST_{target.upper()}_IMAGE")


def build_own_image(target: str) -> str:
    """Build one of the repository's images as the tests use it, and return its reference."""
    return build_image(target, f"qlora-{target}:e2e")


def build_from_text(context: Path, dockerfile: str, reference: str) -> None:
    """Build an image whose Dockerfile is part of this program."""
    (context / "Dockerfile").write_text(dockerfile)
    buildah.build(context, context / "Dockerfile", reference)


def is_built(reference: str) -> bool:
    """Say whether the local storage has an image."""
    return any(reference in (image.get("names") or []) for image in local_images())


def local_images() -> list[dict[str, Any]]:
    """Return buildah's images, newest first."""
    images = json.loads(buildah.buildah("images", "--json") or "null") or []
    return sorted(images, key=lambda image: image["createdatraw"], reverse=True)


def prune_builds(reference: str) -> None:
    """Remove all but the newest images of this name, and every layer that no image uses any more."""
    name = reference.rpartition(":")[0]
    names = [str(each) for image in local_images() for each in image.get("names") or []]
    tags = [each for each in names if each.rpartition(":")[0] == name and each != reference]
    dangling = buildah.buildah("images", "--quiet", "--filter", "dangling=true").split()
    if old := [*tags[KEPT_TAGS - 1 :], *dangling]:
        buildah.buildah("rmi", *old)


def load_image(containerd: Containerd, processes: Processes, reference: str) -> str:
    """Bring an image to the node under its own reference, and only the layers that the node lacks."""
    address = ensure_registry(processes)
    copy = f"{address}/{reference.removeprefix('localhost/')}"
    zstd = ["--compression-format", "zstd", "--compression-level", "3"]
    buildah.buildah("push", "--quiet", "--tls-verify=false", "--format", "oci", *zstd, reference, f"docker://{copy}")
    containerd.ctr("images", "pull", "--plain-http", copy)
    containerd.ctr("images", "tag", "--force", copy, reference)
    containerd.ctr("images", "delete", copy)
    prune_node(containerd, reference)
    return reference


def prune_node(containerd: Containerd, kept: str) -> None:
    """Remove the other tags of this name, and what no tag names any more; a container that runs keeps its layers."""
    images = containerd.images()
    name = kept.rpartition(":")[0]
    tags = {tag: digest for tag, digest in images.items() if not tag.startswith("sha256:")}
    old = {tag for tag in tags if tag.rpartition(":")[0] == name and tag != kept}
    in_use = {digest for tag, digest in tags.items() if tag not in old}
    if unused := [image for image, digest in images.items() if image in old or digest not in in_use]:
        containerd.ctr("images", "delete", *unused)


def ensure_pause_image(containerd: Containerd) -> None:
    """Give the node the image that every pod needs first."""
    if PAUSE_IMAGE in containerd.images():
        return
    work = ensure_folder(buildah.HOME / "pause")
    shutil.copy("/bin/busybox", work / "busybox")
    build_from_text(work, PAUSE_DOCKERFILE, PAUSE_IMAGE)
    archive = work / "pause.tar"
    archive.unlink(missing_ok=True)
    buildah.buildah("push", "--quiet", PAUSE_IMAGE, f"docker-archive:{archive}:{PAUSE_IMAGE}")
    containerd.ctr("images", "import", archive)
    containerd.ctr("images", "label", PAUSE_IMAGE, "io.cri-containerd.pinned=pinned")
    shutil.rmtree(work)
