#!/usr/bin/env bash
# What srun starts for each task of launch/slurm.sbatch: a node's torchrun or, if SPMD_NATIVE=1, a rank.
# A task that stopped in good order (75) is no bad exit: srun would kill the others, which are about to do the same.
set -uo pipefail
trap : TERM INT USR1  # these are for what it runs, which gets them too

if [ "$SPMD_NATIVE" = 1 ]; then
  log=$SPMD_OUTPUT/rank-$SLURM_PROCID.log
  if [ "$SLURM_PROCID" = 0 ]; then
    "$@"
  else
    "$@" >"$log" 2>&1
  fi
else
  export PET_LOG_DIR=$SPMD_OUTPUT/$SLURMD_NODENAME PET_LOCAL_ADDR=$SLURMD_NODENAME
  export PET_RDZV_CONF=is_host=$((SLURM_NODEID == 0)),read_timeout=600
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
  "$@"
fi
status=$?

case $status in
  0) exit 0 ;;
  75) [ -s "$SPMD_STATUS" ] || echo 75 >"$SPMD_STATUS"
    exit 0 ;;
esac
echo "$status" >"$SPMD_STATUS.$SLURM_PROCID"
if [ "$SPMD_NATIVE" = 1 ] && [ "$SLURM_PROCID" != 0 ] && mkdir "$SPMD_OUTPUT/failed" 2>/dev/null; then  # the first one
  echo "error: rank $SLURM_PROCID on $SLURMD_NODENAME ended with $status; the end of $log:" >&2
  tail -n 20 "$log" >&2
fi
exit "$status"
