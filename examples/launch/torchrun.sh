#!/usr/bin/env bash
# Start training on this node: one node alone, or the same command on each of several. See --help and docs/launch.md.
set -euo pipefail

usage() {
    cat <<'END'
usage: [VARIABLE=value …] torchrun.sh CONFIG [key=value …]

Trains with torchrun: one node, or the same command on every node of a job (c10d rendezvous). After a fault the workers
start again from the newest checkpoint by themselves. What one node needs:

  NPROC_PER_NODE      processes on this node (default: its GPUs as nvidia-smi counts them, 1 without)
  MAX_RESTARTS        how often workers that failed are started again (default 3)
  SHUTDOWN_TIMEOUT_S  seconds that workers have to save after SIGTERM before they are killed (default 600)
  CHECK               1: check the configuration once before anything starts, 0: do not (default 1)
  PYTHON              interpreter with opencoder (default python)

For several nodes, the same on all but LOCAL_ADDR:

  NNODES              nodes of the job, a whole number (default 1)
  RDZV_ENDPOINT       HOST or HOST:PORT of the node where all meet; the port is 29500 unless told
  RDZV_ID             name of the job, where several meet at one endpoint (default opencoder)
  LOCAL_ADDR          address of this node for the others (default: what its host name resolves to); on the node where all
                      meet, written as in RDZV_ENDPOINT
  JOIN_TIMEOUT_S      seconds to wait for all nodes, at the start and after one is lost (default 1800)

Signals: SIGTERM or Ctrl-C saves and stops, SIGUSR1 saves and goes on. Exit status: 0 done, 2 a mistake in the call or the
configuration, else torchrun's own (1 after a stop too).
END
}

fail() {
    echo "error: $*" >&2
    exit 2
}

whole_number() { # NAME MINIMUM: the variable holds a whole number from MINIMUM on
    if [[ ! ${!1} =~ ^[0-9]+$ ]] || ((10#${!1} < $2)); then fail "$1=${!1} must be a whole number from $2 on"; fi
}

gpus() {
    local found
    found=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || true
    echo $((found > 0 ? found : 1))
}

case ${1-} in
-h | --help)
    usage
    exit 0
    ;;
"") fail "no configuration given: torchrun.sh CONFIG [key=value …]; see torchrun.sh --help" ;;
-*) fail "unknown option $1: settings are environment variables; see torchrun.sh --help" ;;
esac
[[ -f $1 ]] || fail "there is no configuration file $1"

PYTHON=${PYTHON:-python}
NNODES=${NNODES:-1}
NPROC_PER_NODE=${NPROC_PER_NODE:-$(gpus)}
MAX_RESTARTS=${MAX_RESTARTS:-3}
SHUTDOWN_TIMEOUT_S=${SHUTDOWN_TIMEOUT_S:-600}
JOIN_TIMEOUT_S=${JOIN_TIMEOUT_S:-1800}
CHECK=${CHECK:-1}
for name in NNODES NPROC_PER_NODE; do whole_number "$name" 1; done
for name in MAX_RESTARTS SHUTDOWN_TIMEOUT_S JOIN_TIMEOUT_S CHECK; do whole_number "$name" 0; done
command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is no command: name an interpreter that has opencoder"
"$PYTHON" -c 'from importlib.util import find_spec as found; raise SystemExit(not (found("torch") and found("opencoder")))' ||
    fail "PYTHON=$PYTHON ($(command -v "$PYTHON")) has no opencoder: activate its environment, or name its interpreter"

options=(--nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "$MAX_RESTARTS"
    --shutdown-timeout "$SHUTDOWN_TIMEOUT_S")
if ((NNODES == 1)); then
    options+=(--standalone)
else
    [[ -n ${RDZV_ENDPOINT-} ]] ||
        fail "NNODES=$NNODES needs RDZV_ENDPOINT=HOST:PORT, the same on all nodes: one of them, and a free port on it"
    [[ $RDZV_ENDPOINT == *:* ]] || RDZV_ENDPOINT+=:29500
    options+=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-opencoder}")
    conf=join_timeout=$JOIN_TIMEOUT_S
    if [[ -n ${LOCAL_ADDR-} ]]; then
        options+=(--local-addr "$LOCAL_ADDR")
        # Torch takes a node for the meeting place if its host name resolves to the endpoint: not so with several networks.
        [[ $LOCAL_ADDR != "${RDZV_ENDPOINT%:*}" ]] || conf+=,is_host=true
    fi
    options+=(--rdzv-conf "$conf")
    # Else the agent of rank 0 tells where its store is at the first meeting only, and a node that comes in place of a lost one
    # waits for it in vain (torch 2.13).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi

# torchrun starts workers again whatever they failed of, so a mistake in the configuration is found here, once.
if ((CHECK)); then
    "$PYTHON" -m opencoder.train "$@" --dry-run --world-size $((NNODES * NPROC_PER_NODE)) >/dev/null || exit
fi

# The agent and workers that have not come so far as to handle SIGUSR1 must not die of it: what is ignored here is ignored there.
start() {
    (
        trap '' USR1
        exec "$PYTHON" -m torch.distributed.run "${options[@]}" -m opencoder.train "$@"
    ) &
    agent=$!
}

interrupted=1
if [[ -n ${SLURM_STEP_ID-} ]]; then
    # Slurm itself signals every process of a step, and an agent that gets SIGTERM twice leaves its workers.
    trap 'interrupted=1' TERM USR1
    start "$@"
else
    set -m # a process group of its own, so that Ctrl-C comes here alone: torchrun would not let the workers save
    start "$@"
    set +m
    trap 'interrupted=1; kill -TERM "$agent" 2>/dev/null || true' TERM INT
    trap 'interrupted=1; pkill -USR1 -P "$agent" || true' USR1
fi

while ((interrupted)); do # a signal ends `wait` before the agent has ended
    interrupted=0
    status=0
    wait "$agent" || status=$?
done
exit "$status"
