# Sourced, after podman.sh, by the tests that build an image and run it: what they build from, the container
# that they run, its size. They set $target, a stage of the Dockerfile.

image=fathom:$target
# A folder each: pip would take torch's CPU build for the CUDA one, if it saw both.
wheels=$work/wheels/$target
mkdir -p "$wheels"
name=fathom-test-$$
port=$(free_port)
url=http://127.0.0.1:$port
trap 'podman rm --force --volumes "$name" >/dev/null 2>&1 || true' EXIT

fail() {
  echo "FAILED: $*" >&2
  podman logs "$name" 2>&1 | tail -20 >&2 || true
  exit 1
}

base() { # what the image is built from, in $base, and its Python's release, in $python
  base=${BASE_IMAGE:-localhost/fathom-base:bookworm}
  if [ -z "${BASE_IMAGE:-}" ] && ! podman image exists "$base"; then
    debian "$base" python3,python3-venv,ca-certificates
  fi
  python=$(podman run --rm "$base" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
}

download() { # WHAT... : wheels for the base's Python, by whatever index this user's pip asks
  python3 -m pip download --quiet --no-deps --only-binary :all: --python-version "$python" --dest "$wheels" "$@"
}

build() { # OPTION... : without a network, from what was downloaded
  printf '[global]\nno-index = true\nfind-links = /wheels\n' >"$work/pip.conf"
  podman build --network none --format docker --target "$target" --tag "$image" \
    --volume "$wheels:/wheels:ro" --volume "$work/pip.conf:/etc/pip.conf:ro" \
    --build-arg "BASE_IMAGE=$base" --file docker/Dockerfile "$@" . >"$work/build-$target.log" 2>&1 ||
    { tail -30 "$work/build-$target.log" >&2; exit 1; }
}

start() { # OPTION... : serve with a read-only root, in which only /state can be written, and wait
  podman run --detach --name "$name" --read-only --read-only-tmpfs=false --cap-drop all \
    --security-opt no-new-privileges --publish "127.0.0.1:$port:8000" "$@" "$image" >/dev/null
  for _ in $(seq 120); do
    curl --silent --fail "$url/ready" >/dev/null && return
    [ "$(podman inspect --format '{{.State.Running}}' "$name")" = true ] || fail 'the container ended'
    sleep 0.5
  done
  fail 'not ready within 60 s'
}

complete() { # KEY [FIELD]... : fields of the request beside the demo's own
  local key=$1
  shift
  curl --silent --show-error --no-buffer "$url/v1/completions" -H 'Content-Type: application/json' \
    -H "Authorization: Bearer $key" -d '{"model": "pirate", "prompt": "Plain: You are in the park.\nPirate:",
    "temperature": 0, "lora_depth": 12'"$(printf ', %s' "$@")"'}'
}

demo() { # KEY : the demo answers, and the image's own check says that the server is well
  reply=$(complete "$1" '"max_tokens": 48')
  echo "$reply"
  grep -q '"adapter":"pirate","depth":12' <<<"$reply" || fail 'the demo does not answer'
  podman healthcheck run "$name" || fail 'HEALTHCHECK'
}

confined() { # a number for a user, a root that is read-only, no pip
  [ "$(podman exec "$name" id -u)" = 10001 ] || fail 'the user is not 10001'
  podman exec "$name" sh -c 'touch /written || touch /tmp/written || touch /opt/fathom/written' 2>/dev/null &&
    fail 'something outside /state can be written'
  podman exec "$name" sh -c 'touch /state/written && rm /state/written' || fail '/state cannot be written'
  podman exec "$name" python -c 'import pip' 2>/dev/null && fail 'pip is in the image'
  return 0
}

stop() { # end it as `docker stop` does, and require status 0
  podman stop --time 60 "$name" >/dev/null
  code=$(podman inspect --format '{{.State.ExitCode}}' "$name")
  [ "$code" = 0 ] || fail "SIGTERM ended it with status $code"
}

size() {
  podman image inspect --format '{{.Size}}' "$image" "$base" | paste -sd' ' |
    awk '{ printf "image %.0f MB, of which the base %.0f MB\n", $1 / 1e6, $2 / 1e6 }'
  podman save --quiet "$image" | gzip -1 | wc -c | awk '{ printf "compressed (gzip -1) %.0f MB\n", $1 / 1e6 }'
}
