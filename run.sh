#!/usr/bin/env bash
# bash run.sh quick       every experiment in miniature, on the images in data/mini: at most 10 minutes on 2 cores
# bash run.sh overnight   every experiment at the largest scale that 2 CPU cores manage in a few nights, in rows
# bash run.sh             every figure at the paper's scale, for GPUs
# bash run.sh data        downloads what the full run needs
# bash run.sh list        prints the full run's commands; list quick and list overnight print theirs
# bash run.sh test        the test suite; what follows goes to pytest
# bash run.sh help        this
#
# Finished runs are skipped, so the same command goes on after a stop or a crash. Where a command fails, the others run.
#
#   JOBS=4               commands at a time, spread over the GPUs (one a GPU; quick, overnight: one a core, at most 4)
#   PYTHON=python3.12    the Python to use; where it lacks the requirements, they are installed into .venv
#   CIFAR10=FOLDER       images in place of torchvision's CIFAR-10
# The full run also heeds
#   IMAGENET=FOLDER      images for the ImageNet panel, which is left out without them
#   RESULTS=results FIGURES=figures DATA_DIR=data    its folders
#   SEEDS HIDDEN FILTERS NOISES    lists, as below; an empty one drops the commands that it makes
#   RHOS="0.05 0.1"      one grid in place of each workload's own
#   FLAGS="--fp32"       more flags for every command
set -euo pipefail
cd "$(dirname "$0")"
export PYTHON=${PYTHON:-python3}
: "${RESULTS:=results}" "${FIGURES:=figures}" "${DATA_DIR:=data}" "${CIFAR10:=}" "${IMAGENET:=}" "${FLAGS:=}"

# ---- The full run's lists: capitals may be set from outside, the others are changed here ----------------------------

SEEDS=${SEEDS-0 1 2}
HIDDEN=${HIDDEN-75-25 150-50 300-100 1200-400 3000-1000} # MNIST: the MLPs' hidden layers
FILTERS=${FILTERS-4 8 16 32 64 128 256}                  # CIFAR-10: filters of the ResNets' first stage
NOISES=${NOISES-0.25 0.5 0.75}                           # fractions of the training labels that are flipped
noise_filters="4 8 16 32 64"                             # the ResNets that are trained on them
perturbs="last rest random"                              # what SAM perturbs, where half of the labels are flipped
teacher="100 200 300 400 500 600 700 800 900 1000"       # hidden units, for the synthetic regression
curve="5 10 100 1000"                                    # hidden units, for the 12 points
depths="1000-1000-1000-1000 1000-1000-1000 1000-1000 1000"
pruned="150-50:0.5157 300-100:0.7723 1200-400:0.9583"    # width:sparsity, with as many weights left as 75-25 has
pruned_filters="24:0.556 32:0.7506 64:0.938"             # as many as 16 filters have
sharpness="75-25 300-100 1200-400 3000-1000"             # whose curvature under a squared loss is measured
convergence="30-10 300-100 3000-1000"                    # trained at a constant rate
convergence_filters="4 16 64"
mnist_rhos=${RHOS-0.01 0.02 0.05 0.1 0.2 0.5}
cifar_rhos=${RHOS-0.001 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1}
teacher_rhos=${RHOS-0.001 0.01 0.05 0.07 0.1 0.2 0.3 0.5 0.7 1 2}

# ---- The commands ---------------------------------------------------------------------------------------------------
# A list in quotes becomes a line for each of its words: --rho "0.1 0.2" makes two lines. Without quotes it stays one
# line with several values, which --rho, --seed, --hidden, --filters, --noise and --sparsity take. The width comes first.
# A flag that a line of the full run sets belongs into the refusal of FLAGS at the end, too.

always= # what every line ends with; set by commands() below

lines() { split python "$@" $always; }

split() { # split a "b c" "d e" prints the lines a b d, a b e, a c d and a c e
    local word
    if [ $# = 1 ]; then
        echo "$1"
    else
        for word in $2; do split "$1 $word" "${@:3}"; done
    fi
}

both() { # both RHOS COMMAND...: SGD, and SAM at each rho
    lines "${@:2}"
    lines "${@:2}" --sam --rho "$1"
}

pair() { # the same in two lines: SGD, and SAM at all rhos
    lines "${@:2}"
    lines "${@:2}" --sam --rho $1
}

widest_first() { # ResNets before MLPs, wide before narrow: words 3 and 4 of a line are --filters 64 or --hidden 75-25
    LC_ALL=C sort -s -k3,3 -k4,4nr
}

imagenet() { # a run takes days: a line for each seed
    local more="--depth 50 --dataset $IMAGENET --image-size 224 --workers 8 --val-size 5000"
    both "${RHOS-0.005 0.01 0.02 0.05 0.1 0.2}" resnet_width.py --filters "16 32" $more --seed "$SEEDS"
    both "${RHOS-0.01 0.02 0.05 0.1 0.2}" resnet_width.py --filters "48 64 80" $more --seed "$SEEDS"
}

full() { # noise 0 and sparsity 0 are the runs of the widths: plot.py takes them from there
    local mnist="--val-size 5000 --seed $SEEDS"
    local cifar="--val-size 5000 ${CIFAR10:+--dataset $CIFAR10}" seeds="--seed $SEEDS"

    # The gain and the best rho by width and by depth; SGD of twice the epochs: as many gradients as SAM takes
    both "$mnist_rhos" mlp_width.py --hidden "$HIDDEN" --sharpness 100 $mnist
    both "$mnist_rhos" mlp_width.py --hidden "$depths" $mnist
    both "$teacher_rhos" mlp_width.py --hidden "$teacher" --dataset teacher --val-size 2000 --seed $SEEDS
    lines mlp_width.py --hidden "$HIDDEN" --epochs 200 $mnist
    for filters in $FILTERS; do
        local resnet=(resnet_width.py --filters $filters $cifar $seeds)
        [ "$filters" -lt 128 ] || resnet=(resnet_width.py --filters $filters $cifar --seed "$SEEDS") # a line a seed
        both "$cifar_rhos" "${resnet[@]}"
        both "$cifar_rhos" "${resnet[@]}" --weight-decay 0
        lines "${resnet[@]}" --epochs 400
    done

    # Flipped labels; also SGD of fewer epochs, which fits fewer of them, and SAM that perturbs a part of the weights
    for noise in $NOISES; do
        both "$mnist_rhos" label_noise.py --hidden "$HIDDEN" --noise $noise $mnist
        both "$cifar_rhos" label_noise.py --filters "$noise_filters" --noise $noise $cifar $seeds
        lines label_noise.py --hidden "$HIDDEN" --noise $noise --epochs "12 25 50" $mnist
        lines label_noise.py --filters "$noise_filters" --noise $noise --epochs "24 50 100" $cifar $seeds
        [ "$noise" = 0.5 ] || continue
        lines label_noise.py --hidden "$HIDDEN" --noise 0.5 $mnist --perturb "$perturbs" --sam --rho "$mnist_rhos"
        lines label_noise.py --filters "$noise_filters" --noise 0.5 $cifar $seeds --perturb "$perturbs" \
            --sam --rho "$cifar_rhos"
    done

    # Wide networks with as many weights as a narrow one, the others removed
    for item in $pruned; do
        both "$mnist_rhos" sparsity.py --hidden ${item%:*} --sparsity ${item#*:} --pruner "random snip" $mnist
    done
    for item in $pruned_filters; do
        both "$cifar_rhos" sparsity.py --filters ${item%:*} --sparsity ${item#*:} --pruner "random snip" $cifar $seeds
    done

    # Functions fitted to 12 points; curvature; the training loss by epoch
    both "${RHOS-0.2}" mlp_width.py --hidden "$curve" --dataset "curve curve-scaled" --seed $SEEDS
    both "${RHOS-0.01 0.02 0.05 0.1 0.2}" mlp_width.py --hidden "$sharpness" --loss mse --schedule constant \
        --momentum 0 --weight-decay 0 --sharpness 1000 $mnist
    both "${RHOS-0.05}" mlp_width.py --hidden "$convergence" --schedule constant --epochs 20 $mnist
    both "${RHOS-0.05}" resnet_width.py --filters "$convergence_filters" --schedule constant --epochs 75 $cifar $seeds
}

overnight() { # in rows, since the last may not be reached
    local three="--seed 0 1 2" five="--seed 0 1 2 3 4" fresh="--seed 5 6 7 8 9 10 11 12 13 14"
    local all="--val-size 5000" some="--train-size 10000 --val-size 5000"
    local widths="1200-400 300-100 150-50 75-25"
    local teacher="1000 900 800 700 600 500 400 300 200 100" curve="1000 100 10 5"
    local pruned="1200-400:0.9583 300-100:0.7723 150-50:0.5157"
    local noisy=(label_noise.py --hidden "$widths" $some $five)
    local noisy_narrow=(label_noise.py --hidden "300-100 150-50 75-25" $some $five)
    local cifar="--amp --val-size 5000 ${CIFAR10:+--dataset $CIFAR10} --seed 0"

    # 1. Flipped labels; the last three: a lower rho where the best of the others was the lowest
    both "0.1 0.2 0.3 0.5 0.7" "${noisy[@]}" --noise 0.25 --epochs 60
    both "0.1 0.2 0.3 0.5" "${noisy[@]}" --noise 0.5 --epochs 60
    both "0.05 0.1 0.2 0.3" "${noisy[@]}" --noise 0.75 --epochs 60
    lines "${noisy[@]}" --noise 0.5 --epochs 60 --perturb "last rest" --sam --rho "0.1 0.2 0.3"
    lines "${noisy[@]}" --noise "0.25 0.5 0.75" --epochs "3 6 12 24"
    lines "${noisy[@]}" --noise 0.5 --epochs 120
    lines "${noisy[@]}" --noise 0.25 --epochs "12 24" --sam --rho "0.2 0.3 0.5"
    lines "${noisy[@]}" --noise 0.5 --epochs "12 24" --sam --rho "0.1 0.2 0.3"
    lines "${noisy[@]}" --noise 0.75 --epochs "12 24" --sam --rho "0.05 0.1 0.2"
    lines "${noisy_narrow[@]}" --noise 0.25 --epochs "12 24" --sam --rho 0.1
    lines "${noisy_narrow[@]}" --noise 0.5 --epochs "12 24" --sam --rho 0.05
    lines "${noisy_narrow[@]}" --noise 0.75 --epochs "12 24" --sam --rho 0.02

    # 2. The synthetic regression; functions fitted to 12 points
    both "0.1 0.2 0.5 0.7" mlp_width.py --hidden "$teacher" --dataset teacher --val-size 2000 $three
    lines mlp_width.py --hidden "$teacher" --dataset teacher --val-size 2000 --epochs "6 12 25 50" $three
    both 0.2 mlp_width.py --hidden "$curve" --dataset "curve curve-scaled" $three

    # 3. Clean labels, the paper's settings
    both "0.05 0.1 0.2 0.5" mlp_width.py --hidden 1200-400 $all $three
    both "0.05 0.1 0.2 0.5" mlp_width.py --hidden 300-100 --sharpness 100 $all $five
    both "0.05 0.1 0.2 0.5" mlp_width.py --hidden "150-50 75-25" $all $five

    # 4. Curvature; the training loss by epoch
    both "0.01 0.02 0.05 0.1 0.2" mlp_width.py --hidden 300-100 --train-size 1000 --epochs 300 --loss mse \
        --schedule constant --lr 0.1 --momentum 0 --weight-decay 0 --sharpness 1000 $three
    both 0.05 mlp_width.py --hidden "1200-400 300-100 30-10" --schedule constant --epochs 20 $three

    # 5. Sparsity, and the dense networks beside it
    both "0.1 0.2" mlp_width.py --hidden "$widths" --epochs 30 $all $three
    for item in $pruned; do
        both "0.1 0.2" sparsity.py --hidden ${item%:*} --sparsity ${item#*:} --pruner "random snip" --epochs 30 \
            $all $three
    done

    # 6. No weight decay; depth; SGD of twice the epochs
    both "0.1 0.2" mlp_width.py --hidden "$widths" --weight-decay 0 --epochs 30 $all $three
    both "0.1 0.2" mlp_width.py --hidden "300-300-300-300 300-300-300 300-300 300" --epochs 30 $all $three
    lines mlp_width.py --hidden "$widths" --epochs 60 $all $three

    # 7. Small ResNets; seed 0 was for finding settings in which so small ones memorize
    both "0.1 0.2" label_noise.py --filters "16 8 4" --noise 0.5 --epochs 30 --train-size 2000 --val-size 1000 \
        --batch-size 32 --dataset mnist --seed 1 2 3

    # 8. The paper's widest MLP
    both "0.1 0.2" mlp_width.py --hidden 3000-1000 $all $three

    # 9. Flipped labels: weight decay and learning rate tuned
    both "0.1 0.2 0.3" "${noisy[@]}" --noise 0.5 --epochs "12 24 60" --weight-decay "0.001 0.003"
    lines "${noisy[@]}" --noise 0.5 --epochs 12 --lr "0.03 0.3"
    both "0.1 0.2" "${noisy[@]}" --noise 0.5 --epochs 24 --lr "0.03 0.3"
    lines "${noisy[@]}" --noise "0.25 0.75" --epochs 12 --weight-decay "0.001 0.003"
    both "0.2 0.3" "${noisy[@]}" --noise 0.25 --epochs 24 --weight-decay "0.001 0.003"
    both "0.05 0.1" "${noisy[@]}" --noise 0.75 --epochs 24 --weight-decay "0.001 0.003"

    # 10. Row 9's choices, as width:rho:decay, on fresh seeds, and SAM in a random direction; row 1's settings beside them
    lines label_noise.py --hidden "$widths" --noise 0.5 --epochs 24 --weight-decay 0.003 $some $fresh
    lines label_noise.py --hidden "$widths" --noise 0.5 --epochs 12 $some $fresh
    for item in 1200-400:0.3:0.0001 300-100:0.2:0.0001 150-50:0.1:0.001 75-25:0.1:0.001; do
        IFS=: read -r hidden rho decay <<<"$item"
        local chosen=(label_noise.py --hidden $hidden --noise 0.5 --epochs 24 --weight-decay $decay $some)
        lines "${chosen[@]}" $fresh --sam --rho $rho
        lines "${chosen[@]}" $five --perturb random --sam --rho $rho
    done
    lines label_noise.py --hidden 150-50 --noise 0.5 --epochs 24 $some $fresh --sam --rho 0.2
    lines label_noise.py --hidden 75-25 --noise 0.5 --epochs 24 $some $fresh --sam --rho 0.1

    # 11. Other widths; two lower radii for 30-10, which learns nothing at 0.2 and 0.3
    lines label_noise.py --hidden "3000-1000 30-10" --noise 0.5 --epochs 12 $some $three
    both "0.2 0.3" label_noise.py --hidden "3000-1000 30-10" --noise 0.5 --epochs "24 60" $some $three
    lines label_noise.py --hidden 30-10 --noise 0.5 --epochs "24 60" $some $three --sam --rho "0.05 0.1"

    # 12. All 55,000 images
    lines label_noise.py --hidden "1200-400 300-100 75-25" --noise 0.5 --epochs "12 24" $all $three
    both "0.2 0.3" label_noise.py --hidden "1200-400 300-100 75-25" --noise 0.5 --epochs 60 $all $three

    # 13. Fashion-MNIST
    local fashion=(label_noise.py --hidden "$widths" --dataset fashionmnist --weight-decay "0.0001 0.001" $some $three)
    lines "${fashion[@]}" --noise 0.5 --epochs 12
    both "0.01 0.02 0.05 0.1" "${fashion[@]}" --noise 0.5 --epochs "24 60"

    # 14 and 15. CIFAR-10, the paper's settings: half of the labels flipped
    for filters in 16 4; do
        lines label_noise.py --filters $filters --noise 0.5 --epochs "200 100 50 25" $cifar
        lines label_noise.py --filters $filters --noise 0.5 --epochs "200 50" $cifar --sam --rho 0.1
    done

    # 16. CIFAR-10, the paper's settings: clean labels
    lines resnet_width.py --filters "16 4" $cifar
}

quick() { # small networks share a line, since starting one takes seconds, too; the widest stand first
    local mini="--val-size 500 --data-dir data/mini --dataset mnist"
    local two="$mini --seed 0 1" three="$mini --seed 0 1 2"
    local widths="1200-400 300-100 75-25"

    for hidden in 1200-400 "300-100 150-50 75-25"; do
        pair "0.1 0.2" label_noise.py --hidden $hidden --noise 0.5 --epochs 20 $three
    done
    lines label_noise.py --hidden 1200-400 300-100 150-50 75-25 --noise 0.5 --epochs 5 $three
    pair "0.05 0.1" label_noise.py --hidden 300-100 75-25 --noise 0.75 --epochs 20 $two
    lines label_noise.py --hidden $widths --noise 0.5 --epochs 20 --perturb "last rest" $two --sam --rho 0.2
    pair 0.2 label_noise.py --filters 8 4 --noise 0.5 --train-size 1000 --batch-size 32 --epochs 12 $two
    pair 0.1 mlp_width.py --hidden 1000 400 100 --dataset teacher --val-size 2000 --epochs 20 --seed 0 1
    pair 0.2 mlp_width.py --hidden 1000 100 10 --dataset curve --epochs 5 --seed 0 1
    pair 0.2 mlp_width.py --hidden 1000 10 --dataset curve-scaled --epochs 5 --seed 0 1
    pair "0.1 0.2" mlp_width.py --hidden $widths --epochs 15 $two
    pair 0.1 mlp_width.py --hidden $widths --epochs 15 --weight-decay 0 $two
    lines mlp_width.py --hidden $widths --epochs 30 $two
    pair 0.1 mlp_width.py --hidden 100-100-100-100 100-100-100 100-100 100 --epochs 15 $two
    pair 0.1 sparsity.py --hidden 1200-400 --sparsity 0.9583 --pruner snip --epochs 15 $two
    pair 0.1 sparsity.py --hidden 300-100 --sparsity 0.7723 --pruner snip --epochs 15 $two
    pair "0.1 0.2" mlp_width.py --hidden 300-100 75-25 --train-size 500 --epochs 100 --loss mse \
        --schedule constant --lr 0.05 --momentum 0 --weight-decay 0 --sharpness 50 $two
    pair 0.05 mlp_width.py --hidden 300-100 30-10 --schedule constant --epochs 20 $two
}

commands() { # commands full|quick|overnight
    always="--results results/$1"
    case $1 in
        quick) quick | widest_first ;;
        overnight) overnight ;;
        full)
            [ -n "$SEEDS" ] || return 0
            always=$FLAGS
            [ "$RESULTS" = results ] || always+=" --results $RESULTS"
            [ "$DATA_DIR" = data ] || always+=" --data-dir $DATA_DIR"
            [ -z "$IMAGENET" ] || imagenet | widest_first
            full | widest_first
            ;;
    esac
}

# ---- Python and data ------------------------------------------------------------------------------------------------

refuse() { echo "run.sh: $*" >&2; exit 2; }
python() { "$PYTHON" "$@"; }
new_enough() { python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
meets() { # meets FILE...: whether this Python has the versions that these requirements ask for
    python -c 'if True:
        import fileinput, re, sys
        from importlib.metadata import version
        numbers = lambda text: [int(n) for n in re.findall(r"\d+", text)]
        asked = [line.split(">=") for line in fileinput.input() if ">=" in line]
        sys.exit(any(numbers(version(name)) < numbers(least) for name, least in asked))
    ' "$@" 2>/dev/null
}

setup() { # setup FILE: a Python that meets these requirements: this one, or one in .venv
    local base=$PYTHON
    new_enough || refuse "$PYTHON is not Python 3.10 or newer; name one that is: PYTHON=/path/to/python bash run.sh"
    if meets requirements.txt "$1"; then return; fi
    PYTHON=$PWD/.venv/bin/python
    if new_enough && meets requirements.txt "$1"; then return; fi
    if ! { new_enough && { python -m pip --version || python -m ensurepip; } >/dev/null 2>&1; }; then
        echo "making .venv"
        "$base" -m venv --clear .venv >/dev/null 2>&1 || refuse "$base -m venv .venv fails (is python3-venv installed?)"
    fi
    echo "installing $1 into .venv, which takes some minutes"
    python -m pip install -q --disable-pip-version-check -r "$1" 2>.venv/pip.log ||
        refuse "cannot install $1 into .venv: $(tail -n 1 .venv/pip.log) (more in .venv/pip.log)"
}

download() { # what the commands on standard input train on that torchvision fetches
    local command name
    while read -r command; do
        case $command in
            *"--dataset fashionmnist"*) echo fashionmnist ;;
            *"--dataset mnist"*) echo mnist ;;
            *--dataset*) ;; # a folder, or made by the script
            *--filters*) echo cifar10 ;;
            *) echo mnist ;;
        esac
    done | sort -u | while read -r name; do
        python -c 'import common, sys; sys.argv[0] = "run.sh"; common.read_torchvision(*sys.argv[1:])' \
            "$name" "$DATA_DIR"
    done
}

# ---- Running the commands -------------------------------------------------------------------------------------------

job() { # job INDEX COMMAND...: one command, with its output on the screen and in a log
    local log=$LOGS/$1.log gpus=($GPUS)
    # xargs numbers its SLOTs from 0: a command takes the GPU of one that has ended
    [ -z "$GPUS" ] || export CUDA_VISIBLE_DEVICES=${gpus[${SLOT:-$1} % ${#gpus[@]}]}
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
    local all cores gpus slots= group status=0
    all=$(commands "$1")
    [ -n "$all" ] || refuse "nothing to run: the lists are empty"
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
    [ "$1" = quick ] || download <<<"$all" # now, before several commands do
    mkdir -p "$LOGS" 2>/dev/null || refuse "cannot write to $LOGS"
    nl -ba <<<"$all" >"$LOGS/commands"
    rm -f "$LOGS/failed"
    [[ $(xargs --help </dev/null 2>&1) != *process-slot* ]] || slots=--process-slot-var=SLOT # only GNU's has it
    trap 'stop 129' HUP
    trap 'stop 130' INT
    trap 'stop 143' TERM
    set -m # makes the commands a process group
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

# ---- The command line -----------------------------------------------------------------------------------------------

[[ ! $FLAGS =~ --(results|data-dir|dataset) ]] ||
    refuse "no ${BASH_REMATCH[0]} in FLAGS: the variables RESULTS, FIGURES, DATA_DIR and CIFAR10 name the folders"
[[ ! $FLAGS =~ --(seed|sam|rho|perturb|hidden|filters|noise|sparsity|pruner|epochs|weight-decay|momentum|schedule|loss|val-size|sharpness) ]] ||
    refuse "no ${BASH_REMATCH[0]} in FLAGS: it would take the place of run.sh's own; change the lists instead"
[[ $FILTERS =~ ^[0-9\ ]*$ ]] || refuse "FILTERS are numbers with blanks between them, not $FILTERS"
[[ ! $RESULTS$FIGURES$DATA_DIR$CIFAR10$IMAGENET =~ [[:space:]\'\"\\] ]] ||
    refuse "no folder's name may have a space, a quote or a backslash"

case " $* " in *" -h "* | *" --help "*) set -- help ;; esac
case "$*" in
    "") sweep full "Every figure at the paper's scale" ;;
    quick) sweep quick "Every experiment in miniature, on 4,000 MNIST images, in about 9 minutes on 2 cores" ;;
    overnight) sweep overnight "Every experiment as large as 2 cores manage in a few nights, in about 37 hours" ;;
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
    "job "*) job "${@:2}" ;; # for xargs
    *) refuse "no command '$*'; try quick, overnight, data, list, test or help, or none for the full run" ;;
esac
