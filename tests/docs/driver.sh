# The shell in which a page's blocks run, one after the other: variables, functions and servers stay.
# $1: where the environment goes. $2: descriptor of the paths of blocks to run, one a line. $3: of a line for
# each that has run. What a block starts has neither of them.
set -Eeuo pipefail
trap 'echo "failed: $BASH_COMMAND" >&2' ERR
environment=$1 orders=$2 replies=$3
servers=()

# A server that a block put in the background: the block goes on when it answers, and fails when it ends.
await_ready() {
  servers+=("$1")
  until curl --silent --fail --output /dev/null "http://127.0.0.1:$2/ready"; do
    kill -0 "$1" || { echo "the server ended before it was ready" >&2; return 1; }
    sleep 0.2
  done
}

while read -r -u "$orders" block; do
  eval "source \"\$block\" </dev/null $orders<&- $replies>&-"
  env -0 >"$environment"
  echo done >&"$replies"
done

# Servers have to end well when they are told to; whatever else still runs, just ends.
for job in $(jobs -pr); do
  kill "$job"
  status=0
  wait "$job" || status=$?
  case " ${servers[*]-} " in *" $job "*) [ "$status" = 0 ] || { echo "a server ended with status $status" >&2; exit 1; } ;; esac
done
