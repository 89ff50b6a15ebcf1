#!/usr/bin/env bash
# bash run.sh quick   every experiment in miniature, on the images in data/mini: about 6 minutes on 2 cores
# bash run.sh test    the test suite
# bash run.sh         every figure at the paper's scale; goes on where it was stopped
# bash run.sh list    the full run's commands, one a line; runs nothing
#
# Both sweeps heed JOBS: commands at a time, spread over the GPUs, several on each where JOBS is larger (1; in quick the
# number of cores, at most 4). The full one also heeds SEEDS, RHOS, HIDDEN, FILTERS, NOISE_FILTERS, NOISES, SPARSITIES
# and FLAGS (anything more for every command, such as FLAGS="--amp").
set -euo pipefail
cd "$(dirname "$0")"
: "${PYTHON:=python3}"
: "${SEEDS=0 1 2}" "${RHOS=0.01 0.02 0.05 0.1 0.2 0.5}" "${FLAGS=}"
: "${HIDDEN=75-25 150-50 300-100 1200-400 3000-1000}" "${FILTERS=4 8 16 32 64 128 256}" "${NOISE_FILTERS=4 8 16 32 64}"
: "${NOISES=0.25 0.5 0.75}" "${SPARSITIES=0.5 0.8 0.9 0.94 0.98}"

has() { "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"; }
python() { "$PYTHON" "$@"; }

cores=$(getconf _NPROCESSORS_ONLN)

setup() { # setup REQUIREMENTS MODULE...: a Python that has the modules: this one, or one in .venv
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        { echo "run.sh: $PYTHON is not Python 3.10 or newer; name one that is: PYTHON=/path/to/python bash run.sh" >&2; exit 2; }
    if ! has "${@:2}"; then
        [ -x .venv/bin/python ] || { echo "making .venv"; "$PYTHON" -m venv .venv; }
        export PYTHON=$PWD/.venv/bin/python
        has "${@:2}" || { echo "installing $1 into .venv"; "$PYTHON" -m pip install -q -r "$1"; }
    fi
}

both() { # both COMMAND: one line for SGD, one for SAM at every radius
    echo "$*"
    echo "$* --sam --rho $RHOS"
}

full() { # noise 0 and sparsity 0 are the runs of mlp_width.py and resnet_width.py: plot.py takes them from there
    for h in $HIDDEN; do both python mlp_width.py --hidden "$h" --seed $SEEDS $FLAGS; done
    for k in $FILTERS; do both python resnet_width.py --filters "$k" --seed $SEEDS $FLAGS; done
    for h in $HIDDEN; do both python label_noise.py --hidden "$h" --noise $NOISES --seed $SEEDS $FLAGS; done
    for k in $NOISE_FILTERS; do both python label_noise.py --filters "$k" --noise $NOISES --seed $SEEDS $FLAGS; done
    for pruner in random snip; do
        both python sparsity.py --filters 64 --pruner $pruner --sparsity $SPARSITIES --seed $SEEDS $FLAGS
    done
}

quick() {
    local mini="--data-dir data/mini --dataset mnist --results results/quick --val-size 500 --seed 0 1 2"
    RHOS="0.05"
    both python resnet_width.py --filters 2 4 8 --train-size 1000 --batch-size 32 --epochs 4 $mini
    RHOS="0.1 0.2"
    for h in "75-25 150-50 300-100" 600-200 1200-400; do
        both python label_noise.py --hidden $h --noise 0.5 --epochs 20 $mini
    done
    both python mlp_width.py --hidden 75-25 300-100 600-200 --epochs 20 $mini
    both python sparsity.py --hidden 600-200 --pruner snip --sparsity 0.9 --epochs 20 $mini
    RHOS="0.05 0.1"
    both python label_noise.py --hidden 75-25 300-100 600-200 --noise 0.75 --epochs 20 $mini
}

job() { # job INDEX COMMAND...: one command, its output on the screen and in logs/; 255 tells xargs to start no more
    local log="$LOGS/$1.log" gpus # xargs numbers its SLOTs from 0: a command takes the GPU of one that has ended
    gpus=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, - || true)}
    if [ -n "$gpus" ]; then
        IFS=, read -ra gpus <<<"$gpus"
        export CUDA_VISIBLE_DEVICES=${gpus[$((${SLOT:-$1} % ${#gpus[@]}))]}
    fi
    echo "$ ${*:2}" | tee "$log"
    "${@:2}" 2>&1 | tee -a "$log" || { echo "run.sh: failed: ${*:2} (its output: $log)" >&2; exit 255; }
}

sweep() { # sweep RESULTS FIGURES: runs the commands on standard input, JOBS at a time, then draws
    export LOGS=$1/logs
    mkdir -p "$LOGS"
    local slots=
    [[ $(xargs --help </dev/null 2>&1) != *process-slot* ]] || slots=--process-slot-var=SLOT # only GNU's has it
    nl -ba | xargs $slots -P "$JOBS" -L 1 bash run.sh job ||
        { echo "run.sh: stopped; the finished runs are kept: the same command goes on from them" >&2; exit 1; }
    python plot.py --results "$1" --figures "$2"
}

modules="torch torchvision numpy tqdm matplotlib"
case "${1:-all}" in
    quick)
        echo "Every experiment in miniature, on 4,000 MNIST images: $(quick | wc -l | tr -d ' ') commands, about 6 minutes on 2 cores."
        setup requirements.txt $modules
        JOBS=${JOBS:-$((cores < 4 ? cores : 4))}
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # at any JOBS and on every machine: rounding depends on it
        quick | sweep results/quick figures/quick
        echo "Figures and summary.md are in figures/quick, the results they come from in results/quick."
        ;;
    test)
        setup tests/requirements.txt $modules pytest ruff
        python -m pytest -q "${@:2}"
        ;;
    list) full ;;
    job) job "${@:2}" ;;
    all)
        setup requirements.txt $modules
        JOBS=${JOBS:-1}
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + JOBS - 1) / JOBS))}
        # before several commands download at once
        [[ $FLAGS = *--data* ]] ||
            python -c 'from common import read_dataset; read_dataset("mnist", "data"), read_dataset("cifar10", "data")'
        full | sweep results figures
        echo "Figures and summary.md are in figures, the results they come from in results."
        ;;
    *)
        echo "run.sh: no command $1; the commands are quick, test and list, or none for the full run" >&2
        exit 2
        ;;
esac
