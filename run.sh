#!/usr/bin/env bash
# bash run.sh quick       every experiment in miniature, on the images in data/mini: at most 10 minutes on 2 cores
# bash run.sh overnight   every experiment as large as 2 CPU cores manage in a few nights: results/overnight.sh
# bash run.sh             every figure at the paper's scale, for GPUs
# bash run.sh data        downloads what the full run needs
# bash run.sh list        prints the full run's commands; list quick and list overnight print theirs
# bash run.sh test        the test suite; what follows goes to pytest
# bash run.sh help        this
#
# Finished runs are skipped, so the same command goes on after a stop or a crash. Where a command fails, the others run.
#
#   ONLY="--filters (4|16) "   of the commands only those that match this pattern (of grep -E)
#   JOBS=4                     how many run at a time, spread over the GPUs (else one for each GPU; quick and overnight:
#                              one for each core, at most 4)
#   PYTHON=python3.12          the Python to use; where it lacks the requirements, they are installed into .venv
#   CIFAR10=svhn               another data set, or a folder of images, in place of CIFAR-10
# The full run also heeds
#   IMAGENET=FOLDER            images for the ImageNet panel, which is left out without them
#   RESULTS=results FIGURES=figures DATA_DIR=data    its folders
#   SEEDS HIDDEN FILTERS NOISES    the lists below; an empty one drops the commands that it makes
#   RHOS="0.05 0.1"            one grid in place of each workload's own
#   FLAGS="--fp32"             more flags for every command
set -euo pipefail
cd "$(dirname "$0")"
export PYTHON=${PYTHON:-python3}
: "${ONLY:=}" "${CIFAR10:=}" "${IMAGENET:=}" "${FLAGS:=}"
: "${RESULTS:=results}" "${FIGURES:=figures}" "${DATA_DIR:=data}"

SEEDS=${SEEDS-0 1 2}
HIDDEN=${HIDDEN-75-25 150-50 300-100 1200-400 3000-1000} # MLPs of clean and of flipped labels: their hidden layers
FILTERS=${FILTERS-4 8 16 32 64 128 256}                  # ResNets of clean labels: filters of their first stage
NOISES=${NOISES-0.25 0.5 0.75}                           # fractions of the training labels that are flipped
mnist_rhos=${RHOS-0.01 0.02 0.05 0.1 0.2 0.5}
cifar_rhos=${RHOS-0.001 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1}
teacher_rhos=${RHOS-0.001 0.01 0.05 0.07 0.1 0.2 0.3 0.5 0.7 1 2}

# ---- The commands ---------------------------------------------------------------------------------------------------
# `lines` prints commands: one for each of several words in quotes, while words without quotes stay in one command, as
# --seed, --rho, --hidden, --filters, --noise and --sparsity take them. `both` does so for SGD, and for SAM:
#
#   both mlp_width.py --hidden 300-100 --seed 0 1 --rho "0.1 0.2"
#
#   python mlp_width.py --hidden 300-100 --seed 0 1
#   python mlp_width.py --hidden 300-100 --seed 0 1 --sam --rho 0.1
#   python mlp_width.py --hidden 300-100 --seed 0 1 --sam --rho 0.2
#
# The width comes first, since widest_first sorts by it, and for `both` --rho last. An experiment of your own is a line
# of `full` or `quick`; README's table counts runs: `bash run.sh test tests/test_run_sh.py` says which number is old.

lines() { split python "$@"; }

split() { # split a "b c" "d e" prints the lines a b d, a b e, a c d and a c e
    local word
    if [ $# = 1 ]; then
        echo "$1"
    else
        for word in $2; do split "$1 $word" "${@:3}"; done
    fi
}

both() { # both COMMAND... --rho RADII
    local sgd=()
    while [ "${1?both needs --rho}" != --rho ]; do
        sgd+=("$1")
        shift
    done
    lines "${sgd[@]}"
    lines "${sgd[@]}" --sam "$@"
}

widest_first() { # ResNets before MLPs, wide before narrow: words 3 and 4 of a line are --filters 64 or --hidden 75-25
    LC_ALL=C sort -s -k3,3 -k4,4nr
}

full() { # noise 0 and sparsity 0 are the runs of the widths: plot.py takes them from there
    local held_out="--val-size 5000 --seed $SEEDS"
    local cifar="--val-size 5000 ${CIFAR10:+--dataset $CIFAR10}" # without --seed, which wide ResNets take in quotes
    [ -n "$SEEDS" ] || return 0

    # The gain and the best rho by width and by depth; SGD of twice the epochs: as many gradients as SAM takes
    both mlp_width.py --hidden "$HIDDEN" --sharpness 100 $held_out --rho "$mnist_rhos"
    both mlp_width.py --hidden "1000-1000-1000-1000 1000-1000-1000 1000-1000 1000" $held_out --rho "$mnist_rhos"
    both mlp_width.py --hidden "100 200 300 400 500 600 700 800 900 1000" --dataset teacher --val-size 2000 \
        --seed $SEEDS --rho "$teacher_rhos"
    lines mlp_width.py --hidden "$HIDDEN" --epochs 200 $held_out
    for filters in $FILTERS; do
        local resnet=(resnet_width.py --filters $filters $cifar --seed $SEEDS)
        if [ "$filters" -ge 128 ]; then # a run may take hours: a line for each seed
            resnet=(resnet_width.py --filters $filters $cifar --seed "$SEEDS")
        fi
        both "${resnet[@]}" --rho "$cifar_rhos"
        both "${resnet[@]}" --weight-decay 0 --rho "$cifar_rhos"
        lines "${resnet[@]}" --epochs 400
    done

    # Flipped labels; also SGD of fewer epochs, which fits fewer of them, and SAM that perturbs a part of the weights
    local noisy="4 8 16 32 64" parts="last rest random"
    for noise in $NOISES; do
        both label_noise.py --hidden "$HIDDEN" --noise $noise $held_out --rho "$mnist_rhos"
        both label_noise.py --filters "$noisy" --noise $noise $cifar --seed $SEEDS --rho "$cifar_rhos"
        lines label_noise.py --hidden "$HIDDEN" --noise $noise --epochs "12 25 50" $held_out
        lines label_noise.py --filters "$noisy" --noise $noise --epochs "24 50 100" $cifar --seed $SEEDS
        if [ "$noise" = 0.5 ]; then
            lines label_noise.py --hidden "$HIDDEN" --noise 0.5 $held_out --perturb "$parts" --sam --rho "$mnist_rhos"
            lines label_noise.py --filters "$noisy" --noise 0.5 $cifar --seed $SEEDS --perturb "$parts" --sam \
                --rho "$cifar_rhos"
        fi
    done

    # Wide networks with as many weights as 75-25, or 16 filters, the others removed
    both sparsity.py --hidden 150-50 --sparsity 0.5157 --pruner "random snip" $held_out --rho "$mnist_rhos"
    both sparsity.py --hidden 300-100 --sparsity 0.7723 --pruner "random snip" $held_out --rho "$mnist_rhos"
    both sparsity.py --hidden 1200-400 --sparsity 0.9583 --pruner "random snip" $held_out --rho "$mnist_rhos"
    both sparsity.py --filters 24 --sparsity 0.556 --pruner "random snip" $cifar --seed $SEEDS --rho "$cifar_rhos"
    both sparsity.py --filters 32 --sparsity 0.7506 --pruner "random snip" $cifar --seed $SEEDS --rho "$cifar_rhos"
    both sparsity.py --filters 64 --sparsity 0.938 --pruner "random snip" $cifar --seed $SEEDS --rho "$cifar_rhos"

    # Functions fitted to 12 points; curvature; the training loss by epoch
    both mlp_width.py --hidden "5 10 100 1000" --dataset "curve curve-scaled" --seed $SEEDS --rho "${RHOS-0.2}"
    both mlp_width.py --hidden "75-25 300-100 1200-400 3000-1000" --loss mse --schedule constant --momentum 0 \
        --weight-decay 0 --sharpness 1000 $held_out --rho "${RHOS-0.01 0.02 0.05 0.1 0.2}"
    both mlp_width.py --hidden "30-10 300-100 3000-1000" --schedule constant --epochs 20 $held_out --rho "${RHOS-0.05}"
    both resnet_width.py --filters "4 16 64" --schedule constant --epochs 75 $cifar --seed $SEEDS --rho "${RHOS-0.05}"

    # A run takes days: a line for each seed. --depth, as the third word, sorts before --filters and --hidden
    if [ -n "$IMAGENET" ]; then
        local large="--val-size 5000 --dataset $IMAGENET --image-size 224 --workers 8"
        local rhos=${RHOS-0.01 0.02 0.05 0.1 0.2} narrow_rhos=${RHOS-0.005 0.01 0.02 0.05 0.1 0.2}
        both resnet_width.py --depth 50 --filters "80 64 48" $large --seed "$SEEDS" --rho "$rhos"
        both resnet_width.py --depth 50 --filters "32 16" $large --seed "$SEEDS" --rho "$narrow_rhos"
    fi
}

quick() { # small networks share a line, since Python takes seconds to start; the widest stand first
    local mini="--val-size 500 --data-dir data/mini --dataset mnist"
    local two="$mini --seed 0 1" three="$mini --seed 0 1 2"
    local widths="1200-400 300-100 75-25"

    for hidden in 1200-400 "300-100 150-50 75-25"; do
        both label_noise.py --hidden $hidden --noise 0.5 --epochs 20 $three --rho 0.1 0.2
    done
    lines label_noise.py --hidden 1200-400 300-100 150-50 75-25 --noise 0.5 --epochs 5 $three
    both label_noise.py --hidden 300-100 75-25 --noise 0.75 --epochs 20 $two --rho 0.05 0.1
    lines label_noise.py --hidden $widths --noise 0.5 --epochs 20 --perturb "last rest" $two --sam --rho 0.2
    both label_noise.py --filters 8 4 --noise 0.5 --train-size 1000 --batch-size 32 --epochs 12 $two --rho 0.2
    both mlp_width.py --hidden 1000 400 100 --dataset teacher --val-size 2000 --epochs 20 --seed 0 1 --rho 0.1
    both mlp_width.py --hidden 1000 100 10 --dataset curve --epochs 5 --seed 0 1 --rho 0.2
    both mlp_width.py --hidden 1000 10 --dataset curve-scaled --epochs 5 --seed 0 1 --rho 0.2
    both mlp_width.py --hidden $widths --epochs 15 $two --rho 0.1 0.2
    both mlp_width.py --hidden $widths --epochs 15 --weight-decay 0 $two --rho 0.1
    lines mlp_width.py --hidden $widths --epochs 30 $two
    both mlp_width.py --hidden 100-100-100-100 100-100-100 100-100 100 --epochs 15 $two --rho 0.1
    both sparsity.py --hidden 1200-400 --sparsity 0.9583 --pruner snip --epochs 15 $two --rho 0.1
    both sparsity.py --hidden 300-100 --sparsity 0.7723 --pruner snip --epochs 15 $two --rho 0.1
    both mlp_width.py --hidden 300-100 75-25 --train-size 500 --epochs 100 --loss mse --schedule constant --lr 0.05 \
        --momentum 0 --weight-decay 0 --sharpness 50 $two --rho 0.1 0.2
    both mlp_width.py --hidden 300-100 30-10 --schedule constant --epochs 20 $two --rho 0.05
}

commands() { # commands full|quick|overnight
    local command more="--results results/$1" # what each command ends with
    if [ "$1" = full ]; then
        more=$FLAGS
        [ "$RESULTS" = results ] || more+=" --results $RESULTS"
        [ "$DATA_DIR" = data ] || more+=" --data-dir $DATA_DIR"
    fi
    case $1 in
        overnight) source results/overnight.sh ;;
        *) $1 | widest_first ;;
    esac | while read -r command; do
        echo $command $more # without quotes, since FLAGS may hold more blanks
    done | { grep -E -e "$ONLY" || true; }
}

# ---- Python and data ------------------------------------------------------------------------------------------------

refuse() { echo "run.sh: $*" >&2; exit 2; }
python() { "$PYTHON" "$@"; }

meets() { # meets FILE...: whether this is Python 3.10 or newer and has the versions that these requirements ask for
    python -c 'if True:
        import fileinput, re, sys
        from importlib.metadata import version
        numbers = lambda text: [int(n) for n in re.findall(r"\d+", text)]
        asked = [line.split(">=") for line in fileinput.input() if ">=" in line]
        sys.exit(sys.version_info < (3, 10) or any(numbers(version(name)) < numbers(least) for name, least in asked))
    ' "$@" 2>/dev/null
}

setup() { # setup FILE: a Python that meets these requirements: this one, or one in .venv
    local base=$PYTHON clear=
    meets /dev/null || refuse "$PYTHON is not Python 3.10 or newer; name one that is: PYTHON=/path/to/python"
    if meets requirements.txt "$1"; then return; fi
    PYTHON=$PWD/.venv/bin/python
    if meets requirements.txt "$1"; then return; fi
    echo "installing $1 into .venv, which takes some minutes"
    meets /dev/null || clear=--clear # it holds no Python, or an older one; else venv adds pip, where it lacks that
    "$base" -m venv $clear .venv >/dev/null 2>&1 || refuse "$base -m venv .venv fails (is python3-venv installed?)"
    python -m pip install -q --disable-pip-version-check -r "$1" 2>.venv/pip.log ||
        refuse "cannot install $1 into .venv: $(tail -n 1 .venv/pip.log) (more in .venv/pip.log)"
}

download() { # download COMMANDS: what they train on that torchvision fetches
    local line name names=" "
    while read -r line; do
        case $line in
            *"--dataset "*)
                line=${line#*--dataset }
                names+="${line%% *} "
                ;;
            *--hidden*) names+="mnist " ;; # the scripts' defaults
            *--filters*) names+="cifar10 " ;;
        esac
    done <<<"$1"
    for name in mnist cifar10 fashionmnist kmnist cifar100 svhn; do
        if [[ $names == *" $name "* ]]; then
            python -c 'import common, sys; sys.argv[0] = "run.sh"; common.read_torchvision(*sys.argv[1:])' \
                "$name" "$DATA_DIR"
        fi
    done
}

# ---- Running the commands -------------------------------------------------------------------------------------------

job() { # job INDEX COMMAND...: one command, with its output on the screen and in a log
    local log=$LOGS/$1.log gpus=($GPUS)
    # xargs (GNU's) numbers its SLOTs from 0: a command takes the GPU of one that has ended
    [ -z "$GPUS" ] || export CUDA_VISIBLE_DEVICES=${gpus[SLOT % ${#gpus[@]}]}
    echo "command $1 of $COUNT: ${*:2}" | tee "$log"
    "${@:2}" 2>&1 | tee -a "$log" || { echo "  ${*:2} (its output: $log)" >>"$LOGS/failed"; exit 1; }
}

stop() { # stop STATUS: ends the commands, which are a process group
    trap '' HUP INT TERM
    { disown -a && kill -TERM -- "-$group"; } 2>/dev/null || true # disown: else bash prints a line of its own
    for _ in {1..100}; do kill -0 -- "-$group" 2>/dev/null || break; sleep 0.1; done # until all have ended
    echo "run.sh: stopped; what is finished is kept, and the same command goes on from there" >&2
    exit "$1"
}

sweep() { # sweep full|quick|overnight ABOUT: the commands, JOBS at a time, then the figures
    local all cores gpus group status=0
    all=$(commands "$1")
    [ -n "$all" ] || refuse "nothing to run: no command is left by the lists and by ONLY"
    cores=$(getconf _NPROCESSORS_ONLN)
    gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -x '[0-9]*' || true)
    gpus=${CUDA_VISIBLE_DEVICES-$gpus}
    gpus=(${gpus//,/ })
    if [ "$1" = full ]; then
        JOBS=${JOBS:-$((${#gpus[@]} ? ${#gpus[@]} : 1))}
    else
        JOBS=${JOBS:-$((cores < 4 ? cores : 4))}
        RESULTS=results/$1 FIGURES=figures/$1 DATA_DIR=data
        OMP_NUM_THREADS=1 # on every machine, since rounding depends on it
    fi
    [[ $JOBS =~ ^[1-9][0-9]{0,3}$ ]] || refuse "JOBS is how many commands run at a time, 1 or more, not $JOBS"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + JOBS - 1) / JOBS))}
    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 # keep freed memory: page faults slow ResNets on a CPU
    export GPUS="${gpus[*]-}" LOGS=$RESULTS/logs COUNT=$(($(wc -l <<<"$all")))
    echo "$2: $COUNT commands, $JOBS at a time"

    setup requirements.txt
    [ "$1" = quick ] || download "$all" # now, before several commands do
    mkdir -p "$LOGS" 2>/dev/null || refuse "cannot write to $LOGS"
    nl -ba <<<"$all" >"$LOGS/commands"
    rm -f "$LOGS/failed"
    trap 'stop 129' HUP
    trap 'stop 130' INT
    trap 'stop 143' TERM
    set -m # makes the commands a process group
    xargs ${GPUS:+--process-slot-var=SLOT} -P "$JOBS" -L 1 bash run.sh job <"$LOGS/commands" &
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

# ---- The command line -----------------------------------------------------------------------------------------------

case "$*" in "job "*) job "${@:2}"; exit ;; esac # for xargs: a command of a sweep that has been checked

[[ $HIDDEN$NOISES${RHOS-} != *,* && $SEEDS$FILTERS =~ ^[0-9\ ]*$ ]] ||
    refuse "lists have blanks between their values, and no commas; SEEDS and FILTERS are whole numbers"
[[ ! $RESULTS$FIGURES$DATA_DIR$CIFAR10$IMAGENET =~ [[:space:]\'\"\\] ]] ||
    refuse "no folder's name may have a space, a quote or a backslash"
for word in $FLAGS; do
    flag=${word%%=*}
    [[ $flag != --* || " --results --data-dir $(full)" != *" $flag "* ]] ||
        refuse "no $flag in FLAGS, since run.sh sets it; RESULTS, FIGURES, DATA_DIR, CIFAR10 and lists do that"
done

case " $* " in *" -h "* | *" --help "*) set -- help ;; esac
case "$*" in
    "") sweep full "Every figure at the paper's scale" ;;
    quick) sweep quick "Every experiment in miniature, on 4,000 MNIST images, in about 9 minutes on 2 cores" ;;
    overnight) sweep overnight "Every experiment as large as 2 cores manage in a few nights, in about 37 hours" ;;
    list | "list quick" | "list overnight") commands "${2:-full}" ;;
    data)
        setup requirements.txt
        download "$(commands full)"
        ;;
    test | "test "*)
        setup tests/requirements.txt
        python -m pytest -q -n 2 --dist loadfile "${@:2}" # two processes
        ;;
    help) sed -n '2,/^set/s/^# \{0,1\}//p' run.sh ;;
    *) refuse "no command '$*'; try quick, overnight, data, list, test or help, or none for the full run" ;;
esac
