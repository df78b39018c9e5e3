# Sourced by the tests here, whose directory is the checkout's: podman with storage of its own in $work.

work=$PWD/build/docker
mkdir -p "$work"

for tool in podman runc curl; do
  command -v "$tool" >/dev/null || { echo "No $tool: apt install podman runc curl debootstrap" >&2; exit 1; }
done

# Limits that a container within a container may set, and no systemd.
cat >"$work/containers.conf" <<CONF
[containers]
default_ulimits = ["nofile=8192:8192", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
CONF
export CONTAINERS_CONF=$work/containers.conf

# A program, since podman-compose starts it, too.
cat >"$work/podman" <<PODMAN
#!/bin/sh
exec $(command -v podman) --log-level fatal --root "$work/storage" --runroot "$work/run" "\$@"
PODMAN
chmod +x "$work/podman"
podman() { "$work/podman" "$@"; }

say() { printf '\n== %s\n' "$*"; }

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

debian() { # IMAGE PACKAGES: a Debian as an image
  command -v debootstrap >/dev/null || { echo 'No debootstrap: apt install debootstrap' >&2; exit 1; }
  local image=$1 packages=$2 root=$work/base
  rm -rf "$root"
  debootstrap --variant=minbase --include="$packages" bookworm "$root" >"$work/base.log"
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  tar -C "$root" --one-file-system -c . | podman import --quiet - "$image"
  rm -rf "$root"
}
