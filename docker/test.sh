#!/usr/bin/env bash
# Build the CPU image and run it as docker/README.md tells users to: `make test-docker`, as root, with podman.
#
# No registry of images is asked: where BASE_IMAGE names none, the base is a Debian made by debootstrap
# (bookworm, whose Python is the one that the Dockerfile's own base has). The build has no network either:
# pip finds its packages in a folder that was downloaded before, by whatever index this user's pip asks.
# All of it is kept in build/docker, so that a second run is shorter (some 5 GB); `make clean` removes it.
set -euo pipefail
cd "$(dirname "$0")/.."
. docker/podman.sh
target=cpu
. docker/image.sh

say 'base'
base
podman run --rm "$base" python3 --version

say 'packages'
torch=$(sed -n 's/^ARG TORCH_VERSION=//p' docker/Dockerfile)
for lock in build cpu; do download --require-hashes -r "docker/locks/$lock.txt"; done
index=$(sed -n 's/^CPU_INDEX=//p' .ci/install-torch)
ls "$wheels/torch-$torch+cpu"* >/dev/null 2>&1 || download "torch==$torch+cpu" ||
  download "torch==$torch+cpu" --extra-index-url "$index"

say 'build'
build

say 'nothing said of keys: one is made, and needed'
start
key=$(podman logs "$name" 2>&1 | sed -n 's/^export FATHOM_API_KEY=//p')
[ ${#key} -ge 32 ] || fail "no key is shown"
[ "$(curl --silent --fail "$url/health")" = '{"status":"ok"}' ] || fail '/health'
[ "$(curl --silent --fail "$url/ready")" = '{"status":"ready"}' ] || fail '/ready'
complete wrong '"max_tokens": 48' | grep -q invalid_api_key || fail 'a wrong key is answered'
demo "$key"
curl --silent --fail "$url/" | grep -qi '<title>.*fathom' || fail 'no console at /'
podman exec --env FATHOM_PORT=1 "$name" python -c "$(podman inspect --format '{{index .Config.Healthcheck.Test 3}}' "$name")" \
  2>/dev/null && fail 'HEALTHCHECK passes where nobody listens'

say 'confined; compiled kernels'
confined
podman exec "$name" python -c '
from matplotlib import font_manager
from server.model.native.library import load
assert not isinstance(load(), str), load()
print("kernels:", load().level, "fonts:", len(font_manager.fontManager.ttflist))' || fail 'kernels or fonts'
podman exec "$name" sh -c 'ls -R /state'

say 'SIGTERM while a stream is open: it is finished, status 0'
complete "$key" '"max_tokens": 440' '"ignore_eos": true' '"stream": true' >"$work/stream" &
stream=$!
for _ in $(seq 100); do
  [ "$(grep -c ^data "$work/stream")" -gt 2 ] && break
  sleep 0.05
done
grep -q DONE "$work/stream" && fail 'the stream was over before the signal'
stop
wait "$stream" || fail 'the stream was cut'
grep -q 'DONE' "$work/stream" || fail 'the stream has no end'
grep -q '"error"' "$work/stream" && fail 'the stream ended with an error'
podman rm --volumes "$name" >/dev/null

say 'a key of the operator, an admin key, a database on a tmpfs; another user number'
start --env FATHOM_API_KEY=ours --env FATHOM_ADMIN_KEY=theirs --user 20002:20002 --tmpfs /state
podman logs "$name" 2>&1 | grep -q '^export FATHOM_API_KEY' && fail 'a key is made though one is set'
complete ours '"max_tokens": 48' | grep -q '"adapter":"pirate"' || fail 'the key is not taken'
curl --silent --fail "$url/admin/adapters" -H 'Authorization: Bearer theirs' | grep -q pirate || fail '/admin'
podman exec "$name" ls /state/fathom/fathom.db
stop
podman rm --volumes "$name" >/dev/null

say 'no key and none made: it refuses to start'
podman run --rm --env FATHOM_DATABASE=sqlite:////state/fathom.db "$image" >"$work/refused" 2>&1 &&
  fail 'a server for everybody'
tail -1 "$work/refused"
grep -q -- '--insecure' "$work/refused" || fail 'refused for something else'
podman run --rm "$image" --version

say 'size'
size
echo 'all passed'
