#!/usr/bin/env bash
# Build the CUDA image and run it on a CPU: `make test-docker-cuda`, as root, with podman. A GPU is not used.
#
# All is as in test.sh, and apt finds the compiler in a folder, too, that was filled before. build/docker grows
# by 9 GB, of which 2.8 are wheels; the build takes 6 GB more for a while.
set -euo pipefail
cd "$(dirname "$0")/.."
. docker/podman.sh
target=cuda
. docker/image.sh

say 'base'
base
podman run --rm "$base" python3 --version

say 'packages'
for lock in build cuda; do download --require-hashes -r "docker/locks/$lock.txt"; done
# The compiler by the base's own apt, whose releases are those that fit; and Python's headers for a base
# that has none.
id=$(podman image inspect --format '{{.Id}}' "$base")
debs=$work/debs/${id:0:12}
if ! [ -s "$debs/Packages" ]; then
  mkdir -p "$debs"
  podman run --rm --user 0:0 --network host --volume "$debs:/debs" "$base" sh -euc '
apt-get update -qq
apt-get install -qq --no-install-recommends --download-only -o Dir::Cache::archives=/debs gcc libc6-dev
cd /debs
headers=$(python3 -c "import sysconfig; print(sysconfig.get_path(\"include\", \"posix_prefix\"))")
[ -f "$headers/Python.h" ] || apt-get download -qq -o APT::Sandbox::User=root "libpython$1-dev"
for deb in *.deb; do
  dpkg-deb --field "$deb"
  printf "Filename: ./%s\nSize: %s\nSHA256: %s\n\n" "$deb" "$(stat --format %s "$deb")" \
    "$(sha256sum "$deb" | cut -d " " -f 1)"
done >index
mv index Packages' sh "$python"
fi
echo 'deb [trusted=yes] file:/debs ./' >"$debs/sources.list"
printf 'Dir::Etc::SourceList "/debs/sources.list";\nDir::Etc::SourceParts "-";\n' >"$work/apt.conf"
if ls "$debs"/libpython*-dev_*.deb >/dev/null 2>&1; then
  # The headers alone, as python:3 has them: their package would bring a part of what the build installs.
  with_headers=localhost/fathom-base-headers:bookworm
  printf 'FROM %s\nRUN dpkg-deb --fsys-tarfile /debs/libpython*-dev_*.deb | tar -C / -x ./usr/include\n' "$base" |
    podman build --quiet --network none --format docker --volume "$debs:/debs:ro" --tag "$with_headers" --file - "$debs"
  base=$with_headers
fi

say 'build'
build --volume "$debs:/debs:ro" --volume "$work/apt.conf:/etc/apt/apt.conf:ro"

say 'it starts where no GPU is, and the demo answers'
start --env FATHOM_API_KEY=ours
demo ours

say 'fathom doctor'
podman exec "$name" fathom doctor >"$work/doctor" || fail "doctor: $(cat "$work/doctor")"
cat "$work/doctor"
grep -Eq 'torch build +CUDA [0-9.]+, no usable device' "$work/doctor" || fail 'torch is not built for CUDA'
grep -Eq 'device +cpu' "$work/doctor" || fail 'the device is not the CPU'

say 'confined'
confined

say "Triton compiles what launches kernels, against a driver without a function, and Fathom's kernels to machine code"
stand_in='mkdir /state/driver && gcc -shared -o /state/driver/libcuda.so.1 -x c /dev/null'
# Functions are looked for when they are called, so that the module can be loaded.
launcher='import os, sys
sys.setdlopenflags(os.RTLD_LAZY)
from triton.backends.nvidia.driver import CudaUtils
print(CudaUtils().launch)'
driver=(--env TRITON_LIBCUDA_PATH=/state/driver)
podman exec "$name" sh -c "$stand_in" || fail 'gcc'
podman exec "${driver[@]}" --env CC=false "$name" python -c "$launcher" >"$work/launcher" 2>&1 &&
  fail 'the module is there without a compiler'
grep -q CalledProcessError "$work/launcher" || fail "without a compiler: $(cat "$work/launcher")"
podman exec "${driver[@]}" "$name" python -c "$launcher" || fail 'the module that launches kernels'
podman exec --interactive "$name" python - <tests/model/compile_triton.py | tee "$work/kernels"
grep -q '"capability": 90.*"is_matrix": true' "$work/kernels" || fail 'the kernels'
podman exec "$name" sh -c 'find /state/cache/triton -name "*.so" -o -name "*.cubin"' | sed 's:.*/::' | sort | uniq -c

say 'SIGTERM: status 0'
stop
podman rm --volumes "$name" >/dev/null

say 'on a tmpfs the same, if programs may be run from it, which docker forbids where nothing is said'
on_tmpfs() { # OPTION
  podman run --rm --read-only --cap-drop all --tmpfs "/state:$1" "${driver[@]}" --entrypoint sh "$image" \
    -c "$stand_in && exec python -c '$launcher'"
}
on_tmpfs exec || fail 'a tmpfs'
on_tmpfs noexec >"$work/launcher" 2>&1 && fail 'a module is loaded from where none may be'
grep -q 'failed to map segment' "$work/launcher" || fail "a tmpfs: $(cat "$work/launcher")"

say 'size'
size
echo 'all passed'
