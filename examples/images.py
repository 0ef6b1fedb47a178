#!/usr/bin/env python3
"""Makes the examples' images from Debian's static busybox, for linux/amd64, linux/arm64 and linux/arm/v7, as OCI archives.

usage: images.py FOLDER

web (all platforms) and its -amd64 and -arm64 variants serve the machine's type on port 8080.
"""
import gzip, hashlib, io, json, os, subprocess, sys, tarfile, tempfile

PLATFORMS = {"amd64": {"os": "linux", "architecture": "amd64"},
             "arm64": {"os": "linux", "architecture": "arm64", "variant": "v8"},
             "armhf": {"os": "linux", "architecture": "arm", "variant": "v7"}}
SERVE = "mkdir -p /www; uname -m > /www/index.html; uname -m; exec httpd -f -p 8080 -h /www\n"


def busybox(arch, folder):
    """The program out of Debian's package, fetched with package lists of our own so that nothing on the machine changes."""
    work = os.path.join(folder, arch)
    for sub in ("lists/partial", "cache/archives/partial"):
        os.makedirs(os.path.join(work, sub))
    options = ["-o", f"Dir::State::lists={work}/lists", "-o", f"Dir::Cache={work}/cache",
               "-o", "APT::Sandbox::User=root", "-o", f"APT::Architecture={arch}", "-o", f"APT::Architectures={arch}", "-qq"]
    # one index of several may be out of step on a mirror; what counts is whether the package comes
    subprocess.run(["apt-get", *options, "update"], check=False, stderr=subprocess.DEVNULL)
    subprocess.run(["apt-get", *options, "download", f"busybox-static:{arch}"], check=True, cwd=work)
    package = next(name for name in os.listdir(work) if name.endswith(".deb"))
    subprocess.run(["dpkg-deb", "-x", os.path.join(work, package), os.path.join(work, "root")], check=True)
    for place in ("bin", "usr/bin"):
        path = os.path.join(work, "root", place, "busybox")
        if os.path.exists(path):
            with open(path, "rb") as program:
                return program.read()
    sys.exit(f"busybox-static:{arch} holds no busybox")


def layer(program, applets):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        def add(name, mode, data=None, link=None):
            info = tarfile.TarInfo(name)
            info.mode = mode
            if link:
                info.type, info.linkname = tarfile.SYMTYPE, link
                tar.addfile(info)
            elif data is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        for name in ("bin", "etc", "tmp", "proc", "sys", "dev"):
            add(name, 0o1777 if name == "tmp" else 0o755)
        add("bin/busybox", 0o755, program)
        add("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")
        add("serve", 0o755, ("#!/bin/sh\n" + SERVE).encode())
        for applet in applets:
            add(f"bin/{applet}", 0o777, link="busybox")
    return out.getvalue()


def image(path, name, layers):
    blobs = {}

    def blob(data, media_type):
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    def as_json(value):
        return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()

    manifests = []
    for platform, raw in layers:
        config = {**platform, "config": {"Cmd": ["/serve"], "Env": ["PATH=/bin"]},
                  "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(raw).hexdigest()]}}
        manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                    "config": blob(as_json(config), "application/vnd.oci.image.config.v1+json"),
                    "layers": [blob(gzip.compress(raw, 6, mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip")]}
        entry = blob(as_json(manifest), "application/vnd.oci.image.manifest.v1+json")
        manifests.append({**entry, "platform": platform})
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests}
    top = {**blob(as_json(index), "application/vnd.oci.image.index.v1+json"),
           "annotations": {"org.opencontainers.image.ref.name": name}}
    with tarfile.open(path, "w") as tar:
        def add(name, data):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        add("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        add("index.json", as_json({"schemaVersion": 2, "manifests": [top]}))
        for digest, data in blobs.items():
            add(f"blobs/sha256/{digest}", data)


def main():
    folder = sys.argv[1]
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        programs = {arch: busybox(arch, scratch) for arch in PLATFORMS}
        applets = None
        own = os.path.join(scratch, "busybox")
        with open(own, "wb") as file:
            file.write(programs["amd64"])
        os.chmod(own, 0o755)
        applets = [a for a in subprocess.run([own, "--list"], check=True, capture_output=True, text=True).stdout.split()
                   if a != "busybox"]
        layers = {arch: layer(program, applets) for arch, program in programs.items()}
    for name, archs in {"web": list(PLATFORMS), "web-amd64": ["amd64"], "web-arm64": ["arm64"]}.items():
        image(os.path.join(folder, f"{name}.tar"), "latest", [(PLATFORMS[a], layers[a]) for a in archs])
        print(f"{name}: {', '.join(archs)}")


main()
