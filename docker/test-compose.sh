#!/usr/bin/env bash
# Start compose.yaml as it stands, after test.sh has built the image: `make test-docker`, as root, with podman.
#
# podman-compose, which pip brings, reads the file. PostgreSQL and Prometheus are Debian's, in images made here
# under the names that the file has, since no registry is asked: they take the same variables, files and
# directories as the real ones do. Grafana, which Debian does not have, is not started.
set -euo pipefail
cd "$(dirname "$0")/.."
. docker/podman.sh

project=fathom-test-$$
compose() {
  "$work/compose/bin/podman-compose" --podman-path "$work/podman" --in-pod=false --project-name "$project" \
    -f docker/compose.yaml -f "$work/ports.yaml" "$@"
}
fail() {
  echo "FAILED: $*" >&2
  compose logs 2>&1 | tail -40 >&2 || true
  exit 1
}
trap 'compose --profile postgres --profile watch down --volumes --timeout 20 >/dev/null 2>&1 || true' EXIT

podman image exists fathom:cpu || { echo 'No image fathom:cpu: run docker/test.sh' >&2; exit 1; }
[ -x "$work/compose/bin/podman-compose" ] || { python3 -m venv "$work/compose"; }
"$work/compose/bin/python" -m pip install --quiet 'podman-compose>=1.6'

name_of() { # SERVICE: the image that compose.yaml names for it
  sed -n "/^  $1:/,/^  [a-z]*:\$/s/^    image: //p" docker/compose.yaml
}

say 'images of PostgreSQL and Prometheus'
stand_in=localhost/fathom-neighbours:bookworm
podman image exists "$stand_in" || debian "$stand_in" postgresql,prometheus,curl
mkdir -p "$work/neighbours"
cat >"$work/neighbours/postgres" <<'ENTRY'
#!/bin/sh
set -eu
: "${POSTGRES_PASSWORD:?}"
programs=$(dirname /usr/lib/postgresql/*/bin/initdb)
data=/var/lib/postgresql/data
if [ ! -s "$data/PG_VERSION" ]; then
  chown postgres "$data"
  printf %s "$POSTGRES_PASSWORD" >/tmp/password
  chown postgres /tmp/password
  setpriv --reuid postgres --regid postgres --clear-groups \
    "$programs/initdb" -D "$data" -U "$POSTGRES_USER" -E UTF8 --locale C.UTF-8 -A scram-sha-256 --pwfile /tmp/password
  rm /tmp/password
  echo 'host all all all scram-sha-256' >>"$data/pg_hba.conf"
  mkdir -p /var/run/postgresql
  chown postgres /var/run/postgresql
  setpriv --reuid postgres --regid postgres --clear-groups "$programs/pg_ctl" -D "$data" -w start
  PGPASSWORD=$POSTGRES_PASSWORD "$programs/createdb" -h /var/run/postgresql -U "$POSTGRES_USER" "$POSTGRES_DB" ||
    [ "$POSTGRES_DB" = postgres ]
  setpriv --reuid postgres --regid postgres --clear-groups "$programs/pg_ctl" -D "$data" -w stop
fi
exec setpriv --reuid postgres --regid postgres --clear-groups \
  "$programs/postgres" -D "$data" -c 'listen_addresses=*'
ENTRY
cat >"$work/neighbours/prometheus" <<'ENTRY'
#!/bin/sh
exec prometheus --config.file=/etc/prometheus/prometheus.yml --storage.tsdb.path=/prometheus
ENTRY
chmod +x "$work"/neighbours/*
for service in postgres prometheus; do
  image=$(name_of "$service")
  [ -n "$image" ] || fail "compose.yaml has no image for $service"
  printf 'FROM %s\nCOPY %s /entrypoint\nRUN mkdir -p /prometheus\nENTRYPOINT ["/entrypoint"]\n' "$stand_in" "$service" |
    podman build --quiet --network none --format docker --file - \
      --tag "docker.io/$([[ $image == */* ]] || echo library/)$image" "$work/neighbours"
done

# A port that is free, in place of 8000.
port=$(free_port)
url=http://127.0.0.1:$port
printf 'services:\n  fathom:\n    ports: !override ["127.0.0.1:%s:8000"]\n' "$port" >"$work/ports.yaml"

ready() {
  for _ in $(seq 240); do
    curl --silent --fail "$url/ready" >/dev/null && return
    sleep 0.5
  done
  fail 'not ready within 120 s'
}
complete() {
  curl --silent --show-error "$url/v1/completions" -H 'Content-Type: application/json' \
    -H "Authorization: Bearer $FATHOM_API_KEY" -d '{"model": "pirate", "prompt": "Plain: You are in the park.\nPirate:",
    "temperature": 0, "lora_depth": 12, "max_tokens": 48}'
}
admin() { curl --silent --show-error --fail "$url/admin/$1" -H "Authorization: Bearer $FATHOM_ADMIN_KEY" "${@:2}"; }

say 'by itself: no key, no start; then it answers, and what it keeps outlives it'
compose up --detach >/dev/null 2>&1 && fail 'it starts without FATHOM_API_KEY'
export FATHOM_API_KEY=ours FATHOM_ADMIN_KEY=theirs
compose up --detach
ready
reply=$(complete)
echo "$reply"
grep -q '"adapter":"pirate","depth":12' <<<"$reply" || fail 'the demo does not answer'
admin adapters/pirate/boundary -X PUT -H 'Content-Type: application/json' -d '{"depth": 5, "reason": "compose"}' >/dev/null
compose down --timeout 20
compose up --detach
ready
admin adapters/pirate/boundaries | grep -q compose || fail 'the decision is gone'
compose down --volumes --timeout 20

say 'with PostgreSQL, and watched'
export POSTGRES_PASSWORD=s3cret FATHOM_DATABASE=postgresql://fathom:s3cret@postgres/fathom
both=(--profile postgres --profile watch)
compose "${both[@]}" up --detach fathom postgres prometheus
ready
complete | grep -q '"adapter":"pirate","depth":12' || fail 'it does not answer beside PostgreSQL'
admin adapters/pirate/boundary -X PUT -H 'Content-Type: application/json' -d '{"depth": 5, "reason": "compose"}' >/dev/null
rows=$(compose "${both[@]}" exec -T -e PGPASSWORD=$POSTGRES_PASSWORD postgres \
  psql -h 127.0.0.1 -U fathom -At -c "select count(*) from activations where reason = 'compose'" fathom)
[ "$rows" = 1 ] || fail "PostgreSQL has $rows such decisions"
ask_prometheus() { # QUERY
  compose "${both[@]}" exec -T prometheus curl --silent --get http://127.0.0.1:9090/api/v1/query --data-urlencode "query=$1"
}
for _ in $(seq 60); do
  seen=$(ask_prometheus 'up{job="fathom"}')
  grep -q '"1"\]' <<<"$seen" && break
  sleep 1
done
grep -q '"1"\]' <<<"$seen" || fail "Prometheus does not see the server: $seen"
for _ in $(seq 40); do
  seen=$(ask_prometheus 'vllm:request_success_total > 0')
  grep -q '"metric"' <<<"$seen" && break
  sleep 1
done
echo "$seen"
compose "${both[@]}" down --volumes --timeout 20
echo 'all passed'
