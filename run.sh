#!/usr/bin/env bash
# bash run.sh quick       every experiment in miniature, on the images in data/mini: at most 10 minutes on 2 cores
# bash run.sh overnight   every experiment at the largest scale that 2 CPU cores manage in a night or two
# bash run.sh             every figure at the paper's scale, for GPUs
# bash run.sh data        downloads what the full run needs
# bash run.sh list        prints the full run's commands, longest first; list quick and list overnight print theirs
# bash run.sh test        the test suite; what follows goes to pytest
# bash run.sh help        this
#
# Finished runs are skipped, so the same command goes on after a stop or a crash. Where a command fails, the others run.
#
#   JOBS=4               commands at a time, spread over the GPUs (1; quick and overnight: one a core, at most 4)
#   PYTHON=python3.12    the Python to use; where it lacks the requirements, they are installed into .venv
# The full run also heeds
#   RESULTS=results FIGURES=figures DATA_DIR=data    its folders
#   CIFAR10=FOLDER       images in place of torchvision's CIFAR-10
#   IMAGENET=FOLDER      images for the ImageNet panel, which is left out without them
#   RHOS="0.05 0.1"      one grid in place of each workload's own
#   FLAGS="--amp"        more flags for every command
#   SEEDS HIDDEN FILTERS TEACHER CURVE NOISES NOISE_FILTERS PERTURB DECAYS DEPTHS PRUNERS PRUNED PRUNED_FILTERS
#   SHARPNESS CONVERGENCE CONVERGENCE_FILTERS IMAGENET_FILTERS    lists, as below; an empty one drops its experiments
set -euo pipefail
cd "$(dirname "$0")"
export PYTHON=${PYTHON:-python3}
: "${RESULTS:=results}" "${FIGURES:=figures}" "${DATA_DIR:=data}" "${CIFAR10=}" "${IMAGENET=}" "${FLAGS=}"
: "${SEEDS=0 1 2}" "${HIDDEN=75-25 150-50 300-100 1200-400 3000-1000}" "${FILTERS=4 8 16 32 64 128 256}"
: "${TEACHER=100 200 300 400 500 600 700 800 900 1000}" "${CURVE=5 10 100 1000}"
: "${NOISES=0.25 0.5 0.75}" "${NOISE_FILTERS=4 8 16 32 64}" "${PERTURB=last rest}"
: "${DECAYS=0}" "${DEPTHS=1000 1000-1000 1000-1000-1000 1000-1000-1000-1000}" "${PRUNERS=random snip}"
: "${PRUNED=150-50:0.5157 300-100:0.7723 1200-400:0.9583}" # leaves as many non-zero parameters as 75-25 has
: "${PRUNED_FILTERS=24:0.556 32:0.7506 64:0.938}"          # as many as 16 filters have
: "${SHARPNESS=75-25 300-100 1200-400 3000-1000}" "${CONVERGENCE=30-10 300-100 3000-1000}"
: "${CONVERGENCE_FILTERS=4 16 64}" "${IMAGENET_FILTERS=16 32 48 64 80}"

# The commands. Several values of a flag are several runs; `lines` makes lines of them.

sgd() { echo "python $*"; }
sam() { sgd "${@:2}" --sam --rho $1; } # sam RADII COMMAND
both() { sgd "${@:2}" && sam "$@"; }
equal() { # equal PRUNERS WIDTH:SPARSITY... RADII --hidden|--filters FLAGS: equally many weights left at every width
    local pruner pair
    for pruner in $1; do
        for pair in $2; do both "$3" sparsity.py "$4" "${pair%:*}" --sparsity "${pair#*:}" --pruner "$pruner" "$5"; done
    done
}

full() { # noise 0 and sparsity 0 are the runs of the widths: plot.py takes them from there
    local mnist=${RHOS-0.01 0.02 0.05 0.1 0.2 0.5} cifar=${RHOS-0.001 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1} item radii
    local more="--val-size 5000 --seed $SEEDS" images="--val-size 5000 --seed $SEEDS${CIFAR10:+ --dataset $CIFAR10}"
    both "$mnist" mlp_width.py --hidden $HIDDEN --sharpness 100 $more
    both "$cifar" resnet_width.py --filters $FILTERS $images
    both "${RHOS-0.001 0.01 0.05 0.07 0.1 0.2 0.3 0.5 0.7 1 2}" \
        mlp_width.py --dataset teacher --hidden $TEACHER --val-size 2000 --seed $SEEDS
    both "${RHOS-0.2}" mlp_width.py --dataset curve --hidden $CURVE --seed $SEEDS
    both "${RHOS-0.2}" mlp_width.py --dataset curve-scaled --hidden $CURVE --seed $SEEDS
    both "$mnist" label_noise.py --hidden $HIDDEN --noise $NOISES $more
    both "$cifar" label_noise.py --filters $NOISE_FILTERS --noise $NOISES $images
    for item in 12 25 50; do # SGD of fewer epochs, which fits fewer of the flipped labels
        sgd label_noise.py --hidden $HIDDEN --noise $NOISES --epochs $item $more
        sgd label_noise.py --filters $NOISE_FILTERS --noise $NOISES --epochs $((2 * item)) $images
    done
    [[ ! " $NOISES " =~ " "0?\.50*" " ]] || for item in $PERTURB; do
        sam "$mnist" label_noise.py --hidden $HIDDEN --noise 0.5 --perturb "$item" $more
        sam "$cifar" label_noise.py --filters $NOISE_FILTERS --noise 0.5 --perturb "$item" $images
    done
    sgd mlp_width.py --hidden $HIDDEN --epochs 200 $more # twice the default: as many gradients as SAM takes
    sgd resnet_width.py --filters $FILTERS --epochs 400 $images
    for item in $DECAYS; do both "$cifar" resnet_width.py --filters $FILTERS --weight-decay "$item" $images; done
    both "$mnist" mlp_width.py --hidden $DEPTHS $more
    equal "$PRUNERS" "$PRUNED" "$mnist" --hidden "$more"
    equal "$PRUNERS" "$PRUNED_FILTERS" "$cifar" --filters "$images"
    both "${RHOS-0.01 0.02 0.05 0.1 0.2}" mlp_width.py --hidden $SHARPNESS --loss mse --schedule constant --momentum 0 \
        --weight-decay 0 --sharpness 1000 $more
    both "${RHOS-0.05}" mlp_width.py --hidden $CONVERGENCE --schedule constant --epochs 20 $more
    both "${RHOS-0.05}" resnet_width.py --filters $CONVERGENCE_FILTERS --schedule constant --epochs 75 $images
    [ -z "$IMAGENET" ] || for item in $IMAGENET_FILTERS; do
        radii="0.01 0.02 0.05 0.1 0.2"
        [ "$item" -gt 32 ] || radii="0.005 $radii"
        both "${RHOS-$radii}" resnet_width.py --filters "$item" --depth 50 --dataset "$IMAGENET" --image-size 224 \
            --workers 8 $more
    done
}

overnight() { # an empty line ends a row: the rows stay in order, since the last ones may not be reached
    local three="--val-size 5000 --seed 0 1 2" five="--val-size 5000 --seed 0 1 2 3 4"
    local widths="75-25 150-50 300-100 1200-400" item
    local noisy="label_noise.py --hidden $widths --train-size 10000"
    local teacher="mlp_width.py --dataset teacher --hidden 100 200 300 400 500 600 700 800 900 1000 --val-size 2000"
    both "0.1 0.2 0.3 0.5 0.7" $noisy --noise 0.25 --epochs 60 $five
    both "0.1 0.2 0.3 0.5" $noisy --noise 0.5 --epochs 60 $five
    both "0.05 0.1 0.2 0.3" $noisy --noise 0.75 --epochs 60 $five
    for item in last rest; do sam "0.1 0.2 0.3" $noisy --noise 0.5 --perturb $item --epochs 60 $five; done
    for item in 3 6 12 24; do sgd $noisy --noise 0.25 0.5 0.75 --epochs $item $five; done
    for item in 12 24; do # with a lower radius where the best of the others was the lowest
        sam "0.2 0.3 0.5" $noisy --noise 0.25 --epochs $item $five
        sam "0.1 0.2 0.3" $noisy --noise 0.5 --epochs $item $five
        sam "0.05 0.1 0.2" $noisy --noise 0.75 --epochs $item $five
        sam 0.1 ${noisy/ 1200-400/} --noise 0.25 --epochs $item $five
        sam 0.05 ${noisy/ 1200-400/} --noise 0.5 --epochs $item $five
        sam 0.02 ${noisy/ 1200-400/} --noise 0.75 --epochs $item $five
    done
    sgd $noisy --noise 0.5 --epochs 120 $five
    echo
    both "0.1 0.2 0.5 0.7" $teacher --seed 0 1 2
    for item in 6 12 25 50; do sgd $teacher --epochs $item --seed 0 1 2; done
    for item in curve curve-scaled; do both 0.2 mlp_width.py --dataset $item --hidden 5 10 100 1000 --seed 0 1 2; done
    echo
    both "0.05 0.1 0.2 0.5" mlp_width.py --hidden 75-25 150-50 $five
    both "0.05 0.1 0.2 0.5" mlp_width.py --hidden 300-100 --sharpness 100 $five
    both "0.05 0.1 0.2 0.5" mlp_width.py --hidden 1200-400 $three
    echo
    both "0.01 0.02 0.05 0.1 0.2" mlp_width.py --hidden 300-100 --train-size 1000 --epochs 300 --loss mse \
        --schedule constant --lr 0.1 --momentum 0 --weight-decay 0 --sharpness 1000 --seed 0 1 2
    both 0.05 mlp_width.py --hidden 30-10 300-100 1200-400 --schedule constant --epochs 20 --seed 0 1 2
    echo
    both "0.1 0.2" mlp_width.py --hidden $widths --epochs 30 $three
    equal "random snip" "150-50:0.5157 300-100:0.7723 1200-400:0.9583" "0.1 0.2" --hidden "--epochs 30 $three"
    echo
    both "0.1 0.2" mlp_width.py --hidden $widths --weight-decay 0 --epochs 30 $three
    both "0.1 0.2" mlp_width.py --hidden 300 300-300 300-300-300 300-300-300-300 --epochs 30 $three
    sgd mlp_width.py --hidden $widths --epochs 60 $three
    echo
    both "0.1 0.2" label_noise.py --filters 4 8 16 --noise 0.5 --epochs 30 --train-size 2000 --val-size 1000 \
        --batch-size 32 --dataset mnist --seed 1 2 3 # seed 0 was for finding settings in which so small ones memorize
    echo
    both "0.1 0.2" mlp_width.py --hidden 3000-1000 $three
}

quick() {
    local mini="--val-size 500 --data-dir data/mini --dataset mnist"
    local two="$mini --seed 0 1" clean="mlp_width.py --hidden 75-25 300-100 1200-400"
    local noisy="label_noise.py --hidden 75-25 300-100 1200-400 --noise 0.5 --epochs 20"
    both "0.1 0.2" label_noise.py --hidden 75-25 150-50 300-100 1200-400 --noise 0.5 --epochs 20 $mini --seed 0 1 2
    sgd label_noise.py --hidden 75-25 150-50 300-100 1200-400 --noise 0.5 --epochs 5 $mini --seed 0 1 2
    both "0.05 0.1" label_noise.py --hidden 75-25 300-100 --noise 0.75 --epochs 20 $two
    sam 0.2 $noisy --perturb last $two
    sam 0.2 $noisy --perturb rest $two
    both 0.2 label_noise.py --filters 4 8 --noise 0.5 --train-size 1000 --batch-size 32 --epochs 12 $two
    both 0.1 mlp_width.py --dataset teacher --hidden 100 400 1000 --val-size 2000 --epochs 20 --seed 0 1
    both 0.2 mlp_width.py --dataset curve --hidden 10 100 1000 --epochs 5 --seed 0 1
    both 0.2 mlp_width.py --dataset curve-scaled --hidden 10 1000 --epochs 5 --seed 0 1
    both "0.1 0.2" $clean --epochs 15 $two
    both 0.1 $clean --epochs 15 --weight-decay 0 $two
    sgd $clean --epochs 30 $two
    both 0.1 mlp_width.py --hidden 100 100-100 100-100-100 100-100-100-100 --epochs 15 $two
    equal snip "300-100:0.7723 1200-400:0.9583" 0.1 --hidden "--epochs 15 $two"
    both "0.1 0.2" mlp_width.py --hidden 75-25 300-100 --train-size 500 --epochs 100 --loss mse \
        --schedule constant --lr 0.05 --momentum 0 --weight-decay 0 --sharpness 50 $two
    both 0.05 mlp_width.py --hidden 30-10 300-100 --schedule constant --epochs 20 $two
}

lines() { # lines cpu|gpu SECONDS FLAGS: the commands split into single runs, or what takes SECONDS, the longest first
    LC_ALL=C awk -v machine="$1" -v limit="$2" -v flags="$3" '
    function get(flag, otherwise) { return flag in value ? value[flag] : otherwise }
    function step(width, mlp,    seconds, layer, i) { # that SGD takes for 128 images, roughly, on one core or a GPU
        seconds = mlp ? 0.0005 : 0.07 + 0.0005 * width * width
        for (i = split("784-" width "-10", layer, "-"); mlp && i > 1; i--) seconds += 7e-9 * layer[i] * layer[i - 1]
        if (machine == "cpu") return seconds
        floor = mlp ? 0.002 : 0.007 # launching the kernels takes as long
        return seconds / 400 > floor ? seconds / 400 : floor
    }
    function emit(line,    part, word, n, i, mlp, cost, many) {
        split("", value)
        for (n = split(line, part, " --"); n > 1; n--) {
            i = index(part[n] " ", " ")
            value[substr(part[n], 1, i - 1)] = substr(part[n], i + 1)
        }
        mlp = "hidden" in value
        for (n = split(mlp ? value["hidden"] : value["filters"], word); n > 0; n--) cost += step(word[n], mlp)
        cost *= get("train-size", get("data-dir") ? 4000 : get("dataset") == "teacher" ? 20400 : 55000) / 128
        cost *= get("epochs", mlp ? 100 : 200) * ("sam" in value ? 2 : 1) * ("image-size" in value ? 100 : 1)
        cost += get("sharpness", 0) / 5 * split(mlp ? value["hidden"] : value["filters"], word)
        n = split("seed rho noise filters hidden", part) # the last that has several values is split first
        for (i = 1; i <= n; i++) if (part[i] in value) {
            if (!split(value[part[i]], word)) return # an empty list: no runs
            if (split(value[part[i]], word) > 1) many = part[i]
            if (i < 4) cost *= split(value[part[i]], word)
        }
        if (!many || cost <= limit) { printf "%d\t%d\t%s%s\n", row, cost, line, flags; return }
        many = "--" many " " value[many]
        i = index(line, many)
        n = split(many, word)
        while (n > 1) emit(substr(line, 1, i - 1) word[1] " " word[n--] substr(line, i + length(many)))
    }
    NF { $1 = $1; emit($0) }
    !NF { row++ }' | LC_ALL=C sort -k1,1n -k2,2nr | cut -f3-
}

commands() { # commands full|quick|overnight
    case $1 in
        full) full | lines gpu 100 "$FLAGS" ;;
        overnight) overnight | lines cpu 120 " --results results/overnight" ;;
        quick) quick | lines cpu 90 " --results results/quick" ;;
    esac
}

refuse() { echo "run.sh: $*" >&2; exit 2; }
python() { "$PYTHON" "$@"; }
new_enough() { python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
meets() { # meets FILE: whether this Python has what the requirements ask for
    python -c 'if True:
        import importlib.metadata as metadata, re, sys
        numbers = lambda version: [int(n) for n in re.findall(r"\d+", version)]
        asked = re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(open(name).read() for name in sys.argv[1:]), re.M)
        sys.exit(any(numbers(metadata.version(name)) < numbers(bound) for name, bound in asked))
    ' requirements.txt "$1" 2>/dev/null
}

setup() { # setup FILE: a Python that meets the requirements: this one, or one in .venv
    local base=$PYTHON
    new_enough || refuse "$PYTHON is not Python 3.10 or newer; name one that is: PYTHON=/path/to/python bash run.sh"
    ! meets "$1" || return 0
    PYTHON=$PWD/.venv/bin/python
    ! { new_enough && meets "$1"; } || return 0
    if ! { new_enough && { python -m pip --version || python -m ensurepip; } >/dev/null 2>&1; }; then
        echo "making .venv"
        "$base" -m venv --clear .venv >/dev/null 2>&1 || refuse "$base -m venv .venv fails (is python3-venv installed?)"
    fi
    echo "installing $1 into .venv, which takes some minutes"
    python -m pip install -q --disable-pip-version-check -r "$1" 2>.venv/pip.log ||
        refuse "cannot install $1 into .venv: $(tail -n 1 .venv/pip.log) (more in .venv/pip.log)"
}

download() { # what the commands on standard input train on that torchvision has to fetch
    local name
    for name in $(sed '/--dataset/d; s/.*--hidden.*/mnist/; s/.*--filters.*/cifar10/' | sort -u); do
        python -c 'import common, sys; sys.argv[0] = "run.sh"; common.read_torchvision(*sys.argv[1:])' \
            "$name" "$DATA_DIR"
    done
}

job() { # job INDEX COMMAND...: one command, its output on the screen and in a log
    local log=$LOGS/$1.log gpus # xargs numbers its SLOTs from 0: a command takes the GPU of one that has ended
    gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, - || true)
    gpus=${CUDA_VISIBLE_DEVICES-$gpus}
    if [ -n "$gpus" ]; then
        IFS=, read -ra gpus <<<"$gpus"
        export CUDA_VISIBLE_DEVICES=${gpus[$((${SLOT:-$1} % ${#gpus[@]}))]}
    fi
    echo "command $1 of $COUNT: ${*:2}" | tee "$log"
    "${@:2}" 2>&1 | tee -a "$log" || { echo "  ${*:2} (its output: $log)" >>"$LOGS/failed"; exit 1; }
}

stop() { # stop STATUS
    trap '' HUP INT TERM
    { disown -a && kill -TERM -- "-$group"; } 2>/dev/null || true # disown: else bash prints a line of its own
    for _ in {1..100}; do kill -0 -- "-$group" 2>/dev/null || break; sleep 0.1; done # until all have ended
    echo "run.sh: stopped; what is finished is kept, and the same command goes on from there" >&2
    exit "$1"
}

sweep() { # sweep full|quick|overnight ABOUT: sets up, runs the commands, JOBS at a time, and draws
    local all cores slots= group= status=0
    all=$(commands "$1")
    [ -n "$all" ] || refuse "nothing to run: the lists are empty"
    cores=$(getconf _NPROCESSORS_ONLN)
    if [ "$1" != full ]; then # one thread a command on every machine: rounding depends on it
        RESULTS=results/$1 FIGURES=figures/$1 DATA_DIR=data JOBS=${JOBS:-$((cores < 4 ? cores : 4))}
        : "${OMP_NUM_THREADS:=1}"
    fi
    [[ ${JOBS:=1} =~ ^[1-9][0-9]{0,3}$ ]] || refuse "JOBS is how many commands run at a time, 1 or more, not $JOBS"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + JOBS - 1) / JOBS))}
    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 # keep freed memory: page faults slow ResNets on a CPU
    export LOGS=$RESULTS/logs COUNT=$(($(wc -l <<<"$all")))
    echo "$2: $COUNT commands, $JOBS at a time"
    setup requirements.txt
    download <<<"$all" # before several commands do
    mkdir -p "$LOGS" 2>/dev/null || refuse "cannot write to $LOGS"
    nl -ba <<<"$all" >"$LOGS/commands"
    rm -f "$LOGS/failed"
    [[ $(xargs --help </dev/null 2>&1) != *process-slot* ]] || slots=--process-slot-var=SLOT # only GNU's has it
    trap 'stop 129' HUP
    trap 'stop 130' INT
    trap 'stop 143' TERM
    set -m # makes the commands a process group, which `stop` ends
    xargs $slots -P "$JOBS" -L 1 bash run.sh job <"$LOGS/commands" &
    group=$!
    wait "$group" || status=1
    set +m
    trap - HUP INT TERM
    python plot.py --results "$RESULTS" --figures "$FIGURES" || status=1
    [ ! -e "$LOGS/failed" ] || { echo "run.sh: these commands failed:" && cat "$LOGS/failed"; } >&2
    [ $status = 0 ] || exit 1
    echo "Figures and summary.md are in $FIGURES, the results they come from in $RESULTS."
    [ "$PYTHON" != "$PWD/.venv/bin/python" ] || echo "next: source .venv/bin/activate"
}

if [ "${1-}" = job ]; then job "${@:2}"; exit; fi
[[ ! $FLAGS =~ --(results|data-dir|dataset) ]] ||
    refuse "no ${BASH_REMATCH[0]} in FLAGS: the variables RESULTS, FIGURES, DATA_DIR and CIFAR10 name the folders"
[[ ! $FLAGS =~ --(seed|sam|rho|perturb|hidden|filters|noise|sparsity|pruner|epochs|sharpness) ]] ||
    refuse "no ${BASH_REMATCH[0]} in FLAGS: it would take the place of run.sh's own; change the lists instead"
[[ ! $RESULTS$FIGURES$DATA_DIR$CIFAR10$IMAGENET =~ [[:space:]\'\"\\] ]] ||
    refuse "no folder's name may have a space, a quote or a backslash"
FLAGS=${FLAGS:+ $(echo $FLAGS)} # a blank at the end would make xargs join two lines
[ "$RESULTS" = results ] || FLAGS="$FLAGS --results $RESULTS"
[ "$DATA_DIR" = data ] || FLAGS="$FLAGS --data-dir $DATA_DIR"

for word in "$@"; do case $word in -h | --help) set -- help ;; esac; done
case "$*" in
    "") sweep full "Every figure at the paper's scale" ;;
    quick) sweep quick "Every experiment in miniature, on 4,000 MNIST images, in about 9 minutes on 2 cores" ;;
    overnight) sweep overnight "Every experiment as large as 2 cores manage in a night or two, in about 20 hours" ;;
    list | "list quick" | "list overnight") commands "${2:-full}" ;;
    data)
        setup requirements.txt
        commands full | download
        ;;
    test | "test "*)
        setup tests/requirements.txt
        python -m pytest -q "${@:2}"
        ;;
    help) sed -n '2,/^set/s/^# \{0,1\}//p' run.sh ;;
    *) refuse "no command '$*'; try quick, overnight, data, list, test or help, or none for the full run" ;;
esac
