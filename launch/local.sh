#!/usr/bin/env bash
# Runs spmd on this machine, one process for each of the dp * pp * tp ranks that the config asks for:
#   launch/local.sh [--prog generate|bench|preflight] topology=pp2 model.path=DIR input=in.jsonl output=out.jsonl
# All but --prog goes to Hydra as it stands. Python is $PYTHON, else the active venv's, else .venv's, else python3.
# Ends with 0 (done), 75 (stopped by a signal: start it again to go on), 2 (a mistake, which it tells) or 1 (a crash).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export SPMD_HOME=$root PYTHONUNBUFFERED=1
PYTHONPATH=$root$(printf %s ":${PYTHONPATH:-}" | tr -s : | sed 's/:$//')  # an empty part stands for the current folder
export PYTHONPATH PYTHONSAFEPATH=1  # a random.py of that folder isn't Python's

prog=generate
if [ "${1:-}" = --prog ]; then
  prog=${2:-}
  shift $(($# > 1 ? 2 : 1))
fi
case $prog in
  generate | bench | preflight) ;;
  *) echo "error: --prog is generate, bench or preflight, not '$prog'" >&2; exit 2 ;;
esac

python=${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}
if [ -z "$python" ]; then
  python=$root/.venv/bin/python
  [ -x "$python" ] || python=python3
fi

args=()
for arg in "$@"; do  # of what a shell opens, as in input=<(zcat in.jsonl.gz), only standard input reaches the ranks
  case $arg in
    input=/dev/fd/* | input=/proc/self/fd/*)
      exec <"${arg#input=}"
      arg=input=- ;;
  esac
  args+=("$arg")
done
set -- ${args[@]+"${args[@]}"}

for arg in "--prog=$prog" "$@"; do  # what only prints needs no ranks
  case $arg in
    --prog=preflight | -h | --help | --hydra-help | --version | -c | --cfg | --cfg=* | -i | --info | --info=*)
      exec "$python" -m "spmd.$prog" "$@" ;;
  esac
done

others() {  # threads of others that want a core just now: the fewest of three looks
  local running fewest=100000
  for _ in 1 2 3; do
    IFS=' /' read -r _ _ _ running _ 2>/dev/null </proc/loadavg || running=1  # among them the one that looks
    fewest=$((running - 1 < fewest ? running - 1 : fewest))
    sleep 0.1
  done
  echo "$fewest"
}

processes=$("$python" "$root/launch/size.py" "$@") || exit 2
cores=$(nproc --all 2>/dev/null || getconf _NPROCESSORS_ONLN)
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  mine=$(nproc 2>/dev/null || echo "$cores")
  export OMP_NUM_THREADS=$((mine > processes ? mine / processes : 1))
fi
# Threads that spin while they wait for each other take the very cores that others hold: there they sleep instead.
if [ -z "${OMP_WAIT_POLICY:-}${GOMP_SPINCOUNT:-}" ] && [ "$OMP_NUM_THREADS" != 1 ] &&
  (($(others) + processes * ${OMP_NUM_THREADS%%,*} > cores)); then
  export OMP_WAIT_POLICY=passive
fi
exec "$python" "$root/launch/torchrun.py" --standalone --nproc-per-node "$processes" -m "spmd.$prog" "$@"
