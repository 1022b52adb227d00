#!/usr/bin/env python3
"""Packs a root file system into an OCI image archive of one layer, without docker and without a registry.

The archive depends on its input alone: names are sorted, times are zero, owners are root. `ctr images
import` and `docker load` read it.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import stat
import tarfile
import tempfile
from pathlib import Path

LAYER = "application/vnd.oci.image.layer.v1.tar"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("names", help="image names, separated by commas")
    parser.add_argument("root", type=Path, help="directory, or uncompressed tar")
    parser.add_argument("--entrypoint", type=json.loads, help="JSON list")
    parser.add_argument("--cmd", type=json.loads, help="JSON list")
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--user", default="")
    parser.add_argument("--workdir", default="/")
    return parser.parse_args()


def write_layer(root: Path, out) -> None:
    """Writes the tree as a tar, without sockets: they mean nothing in an image."""
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as layer:
        for directory, subdirectories, files in os.walk(root):
            subdirectories.sort()
            for name in sorted(subdirectories + files):
                path = Path(directory, name)
                if stat.S_ISSOCK(path.lstat().st_mode):
                    continue
                entry = layer.gettarinfo(str(path), str(path.relative_to(root)))
                entry.mtime = 0
                entry.uid = entry.gid = 0
                entry.uname = entry.gname = "root"
                if entry.isreg():
                    with path.open("rb") as content:
                        layer.addfile(entry, content)
                else:
                    layer.addfile(entry)


def digest_of(file) -> str:
    file.seek(0)
    return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    args = arguments()
    with tempfile.TemporaryFile(dir=args.archive.parent) as layer:
        if args.root.is_dir():
            write_layer(args.root, layer)
        else:
            with args.root.open("rb") as tree:
                shutil.copyfileobj(tree, layer)
        size = layer.tell()
        layer_digest = digest_of(layer)

        settings = {"Env": [PATH, *args.env], "WorkingDir": args.workdir}
        for key, value in (("Entrypoint", args.entrypoint), ("Cmd", args.cmd), ("User", args.user)):
            if value:
                settings[key] = value
        blobs = {}

        def blob(media_type: str, document: dict) -> dict:
            data = json.dumps(document, sort_keys=True).encode()
            digest = "sha256:" + hashlib.sha256(data).hexdigest()
            blobs[digest] = data
            return {"mediaType": media_type, "digest": digest, "size": len(data)}

        platform = {"architecture": "amd64", "os": "linux"}
        config = blob(
            CONFIG,
            {**platform, "config": settings, "rootfs": {"type": "layers", "diff_ids": [layer_digest]}},
        )
        manifest = blob(
            MANIFEST,
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": config,
                "layers": [{"mediaType": LAYER, "digest": layer_digest, "size": size}],
            },
        )
        index = {
            "schemaVersion": 2,
            "manifests": [
                {**manifest, "platform": platform, "annotations": {"io.containerd.image.name": name}}
                for name in args.names.split(",")
            ],
        }

        # A reader never sees half an archive, and a build that is killed leaves none.
        unfinished = args.archive.with_name(args.archive.name + ".new")
        with tarfile.open(unfinished, "w", format=tarfile.PAX_FORMAT) as archive:

            def put(name: str, length: int, content) -> None:
                entry = tarfile.TarInfo(name)
                entry.size = length
                archive.addfile(entry, content)

            for name, document in (("oci-layout", {"imageLayoutVersion": "1.0.0"}), ("index.json", index)):
                data = json.dumps(document, sort_keys=True).encode()
                put(name, len(data), io.BytesIO(data))
            for digest, data in blobs.items():
                put(f"blobs/sha256/{digest.removeprefix('sha256:')}", len(data), io.BytesIO(data))
            layer.seek(0)
            put(f"blobs/sha256/{layer_digest.removeprefix('sha256:')}", size, layer)
        unfinished.rename(args.archive)
    print(f"{args.names} {manifest['digest']} {size} bytes")


if __name__ == "__main__":
    main()
