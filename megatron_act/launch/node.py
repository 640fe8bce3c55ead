"""The script of one node: bash that starts torchrun and forwards the notice of a preemption.

It is the same on every platform but for the lines that say where a node is. Each sets

    NODE_RANK    0, 1, ...; node 0 hosts the rendezvous
    NODE_ADDR    how other nodes reach this one
    RDZV_HOST    how all nodes reach node 0
    RDZV_PORT    a port that is free there, and the next one too
    RDZV_ID      the same on all nodes; after a restart of the job another one (Slurm) or the same (the others)
    PREEMPTED    exit code after a preemption: 0, or what makes the platform start the job again

torchrun is `interruption_torchrun`: each start of the ranks has a store of its own, without which a restart hangs.

Signals: the notice (SIGUSR1 from Slurm, SIGTERM from Kubernetes) goes to the ranks, as SIGTERM, to each
once: a second one could end a rank that is done. With Megatron's --exit-signal-handler all ranks save after the current
step and exit with 0. A file beside the checkpoints, the mark, tells the nodes that got no notice why the run ended. One
of an earlier run says nothing: it is older than what the node wrote when it started, by the clock of the same file
system. Nobody deletes it, so that a node of the next run cannot take it from one that has yet to look.
"""

import shlex

from megatron_act.launch import environment
from megatron_act.launch.job import PREFLIGHT, TRAIN, Job

_SIGNALS = r"""
# The notice of a preemption: the ranks save and end. Each is told once, however often it comes.
forward() {
  local agent rank
  touch "$mark" || true
  if [[ -n "$child" ]]; then
    for agent in $(pgrep -P "$child"); do
      for rank in $(pgrep -P "$agent"); do
        if [[ "$told" == *" $rank "* ]]; then continue; fi
        told+="$rank "
        kill -TERM "$rank" || true
      done
    done
  fi
  echo "node $NODE_RANK: notice received, the ranks save and end" >&2
}
child=""
told=" "
mark="$RUN_DIR/preempted-$RDZV_ID"
started="$RUN_DIR/logs/node-$NODE_RANK/started"
touch "$started" # a mark that is older is an earlier run's
trap forward USR1 TERM
"""
_WAIT = r"""
  child=$!
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a trapped signal ends the waiting only
  child=""
  return "$(cat "$code")"
}
"""
_JOINING = r"""
# A node that takes another one's place while the others train joins them: a preflight would wait for all nodes.
if [[ "$NODE_RANK" != 0 ]] && timeout 30 bash -c ": >/dev/tcp/$RDZV_HOST/$RDZV_PORT" 2>/dev/null; then
  echo "node $NODE_RANK: the others train already, no preflight" >&2
else
"""


def torchrun(job: Job) -> list[str]:
    """The torchrun line, one option a line: the same text on every node and platform."""
    seconds = job.settings.rendezvous_seconds
    rendezvous = f"is_host=$((NODE_RANK == 0)),join_timeout={seconds},read_timeout={seconds}"
    return [
        '"$PYTHON" -m megatron_act.interruption_torchrun',
        f"--nnodes {job.nodes}",
        f"--nproc-per-node {job.gpus_per_node}",
        '--max-restarts "$restarts"',
        "--rdzv-backend c10d",
        '--rdzv-id "$RDZV_ID-$module"',
        '--rdzv-endpoint "$RDZV_HOST:$port"',
        f'--rdzv-conf "{rendezvous}"',
        '--local-addr "$NODE_ADDR"',
        '--log-dir "$RUN_DIR/logs/node-$NODE_RANK"',
        "--redirects 3",
        "--tee 3",
        '-m "$module"',
        '--config "$config"',
        *_grouped(job.words()),
        '"$@"',
    ]


def _grouped(words: list[str]) -> list[str]:
    """Quoted words, a flag and its values on one line."""
    lines: list[str] = []
    for word in words:
        quoted = shlex.quote(word)
        if word.startswith("--") or not lines:
            lines.append(quoted)
        else:
            lines[-1] += f" {quoted}"
    return lines


def script(job: Job, place: list[str], workdir: str = "") -> str:
    """The whole script.

    Args:
        job: what runs.
        place: lines that set the variables above.
        workdir: the checkout as a word of shell; default: LAUNCH's.
    """
    checkout = workdir or shlex.quote(job.settings.workdir)
    parts = [
        "#!/usr/bin/env bash",
        f"# One node of {job.name}: {job.nodes} x {job.gpus_per_node} ranks. Written by python -m megatron_act.launch.",
        "set -euo pipefail",
        "",
        "# where this node is",
        *place,
        f"RUN_DIR={shlex.quote(job.folder)}",
        f"PYTHON={shlex.quote(job.settings.python or 'python3')}",
        f'export PYTHONPATH={checkout}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        'mkdir -p "$RUN_DIR/logs/node-$NODE_RANK"',
        "",
        *environment.exports(job.settings.env),
        _SIGNALS,
        "# the config as it was when the job was submitted",
        'config="$(mktemp)"',
        'code="$(mktemp)" # of torchrun: what `wait` says is not certain when a signal comes at that moment',
        'trap \'rm -f "$config" "$code"\' EXIT',
        "cat >\"$config\" <<'MODEL_ARGS_YAML'",
        job.config_text() + "MODEL_ARGS_YAML",
        "",
        "# One module under torchrun. Some Slurm set-ups send SIGUSR1 to all processes: it must not end the ranks.",
        "ranks() {",
        '  local module="$1" port="$2" restarts="$3"',
        "  shift 3",
        '  echo 1 >"$code"',
        "  (",
        "    trap '' USR1",
        "    trap : TERM # torchrun's to answer, this shell writes down how it ends",
        "    result=0",
        "    " + " \\\n      ".join(torchrun(job)) + " || result=$?",
        '    echo "$result" >"$code"',
        "  ) &" + _WAIT.rstrip(),
        "",
        *_steps(job),
    ]
    return "\n".join(parts) + "\n"


def _steps(job: Job) -> list[str]:
    preflight = _preflight(job) if job.preflight else []
    if job.preflight and job.train and job.nodes > 1:
        preflight = [_JOINING.strip(), *(f"  {line}" for line in preflight), "fi"]
    train = [f'ranks {TRAIN} "$RDZV_PORT" {job.settings.max_restarts}'] if job.train else []
    return [*preflight, *train, 'if [[ "$mark" -nt "$started" ]]; then exit "$PREEMPTED"; fi']


def _preflight(job: Job) -> list[str]:
    bandwidth = f" --min-bus-gbps {job.settings.min_bus_gbps}" if job.settings.min_bus_gbps else ""
    return [
        f'ranks {PREFLIGHT} "$((RDZV_PORT + 1))" 0{bandwidth} || {{',
        '  echo "preflight: node $NODE_RANK stops; rank 0 names each failed check" >&2',
        "  exit 2",
        "}",
    ]
