# The commands of `bash run.sh overnight`, which wrote results/overnight, in rows, since the last may not be reached.
# run.sh sources this file: `lines` and `both` are its functions, and explained there. A new row goes to the end.

three="--seed 0 1 2"
five="--seed 0 1 2 3 4"
fresh="--seed 5 6 7 8 9 10 11 12 13 14"
all="--val-size 5000" # images
some="--train-size 10000 --val-size 5000"
widths="1200-400 300-100 150-50 75-25"
teacher="1000 900 800 700 600 500 400 300 200 100"
noisy=(label_noise.py --hidden "$widths" $some $five)
noisy_narrow=(label_noise.py --hidden "300-100 150-50 75-25" $some $five)
cifar="--amp --val-size 5000 ${CIFAR10:+--dataset $CIFAR10} --seed 0"

# 1. Flipped labels; the last three: a lower rho where the best of the others was the lowest
both "${noisy[@]}" --noise 0.25 --epochs 60 --rho "0.1 0.2 0.3 0.5 0.7"
both "${noisy[@]}" --noise 0.5 --epochs 60 --rho "0.1 0.2 0.3 0.5"
both "${noisy[@]}" --noise 0.75 --epochs 60 --rho "0.05 0.1 0.2 0.3"
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
both mlp_width.py --hidden "$teacher" --dataset teacher --val-size 2000 $three --rho "0.1 0.2 0.5 0.7"
lines mlp_width.py --hidden "$teacher" --dataset teacher --val-size 2000 --epochs "6 12 25 50" $three
both mlp_width.py --hidden "1000 100 10 5" --dataset "curve curve-scaled" $three --rho 0.2

# 3. Clean labels, the paper's settings
both mlp_width.py --hidden 1200-400 $all $three --rho "0.05 0.1 0.2 0.5"
both mlp_width.py --hidden 300-100 --sharpness 100 $all $five --rho "0.05 0.1 0.2 0.5"
both mlp_width.py --hidden "150-50 75-25" $all $five --rho "0.05 0.1 0.2 0.5"

# 4. Curvature; the training loss by epoch
both mlp_width.py --hidden 300-100 --train-size 1000 --epochs 300 --loss mse \
    --schedule constant --lr 0.1 --momentum 0 --weight-decay 0 --sharpness 1000 $three --rho "0.01 0.02 0.05 0.1 0.2"
both mlp_width.py --hidden "1200-400 300-100 30-10" --schedule constant --epochs 20 $three --rho 0.05

# 5. Sparsity, and the dense networks beside it
both mlp_width.py --hidden "$widths" --epochs 30 $all $three --rho "0.1 0.2"
for item in 1200-400:0.9583 300-100:0.7723 150-50:0.5157; do # width:sparsity
    both sparsity.py --hidden ${item%:*} --sparsity ${item#*:} --pruner "random snip" --epochs 30 $all $three \
        --rho "0.1 0.2"
done

# 6. No weight decay; depth; SGD of twice the epochs
both mlp_width.py --hidden "$widths" --weight-decay 0 --epochs 30 $all $three --rho "0.1 0.2"
both mlp_width.py --hidden "300-300-300-300 300-300-300 300-300 300" --epochs 30 $all $three --rho "0.1 0.2"
lines mlp_width.py --hidden "$widths" --epochs 60 $all $three

# 7. Small ResNets; seed 0 was for finding settings in which so small ones memorize
both label_noise.py --filters "16 8 4" --noise 0.5 --epochs 30 --train-size 2000 --val-size 1000 \
    --batch-size 32 --dataset mnist --seed 1 2 3 --rho "0.1 0.2"

# 8. The paper's widest MLP
both mlp_width.py --hidden 3000-1000 $all $three --rho "0.1 0.2"

# 9. Flipped labels: weight decay and learning rate tuned
both "${noisy[@]}" --noise 0.5 --epochs "12 24 60" --weight-decay "0.001 0.003" --rho "0.1 0.2 0.3"
lines "${noisy[@]}" --noise 0.5 --epochs 12 --lr "0.03 0.3"
both "${noisy[@]}" --noise 0.5 --epochs 24 --lr "0.03 0.3" --rho "0.1 0.2"
lines "${noisy[@]}" --noise "0.25 0.75" --epochs 12 --weight-decay "0.001 0.003"
both "${noisy[@]}" --noise 0.25 --epochs 24 --weight-decay "0.001 0.003" --rho "0.2 0.3"
both "${noisy[@]}" --noise 0.75 --epochs 24 --weight-decay "0.001 0.003" --rho "0.05 0.1"

# 10. Row 9's choices, as width:rho:decay, on fresh seeds, and SAM in a random direction; row 1's settings beside them
lines label_noise.py --hidden "$widths" --noise 0.5 --epochs 24 --weight-decay 0.003 $some $fresh
lines label_noise.py --hidden "$widths" --noise 0.5 --epochs 12 $some $fresh
for item in 1200-400:0.3:0.0001 300-100:0.2:0.0001 150-50:0.1:0.001 75-25:0.1:0.001; do
    IFS=: read -r hidden rho decay <<<"$item"
    chosen=(label_noise.py --hidden $hidden --noise 0.5 --epochs 24 --weight-decay $decay $some)
    lines "${chosen[@]}" $fresh --sam --rho $rho
    lines "${chosen[@]}" $five --perturb random --sam --rho $rho
done
lines label_noise.py --hidden 150-50 --noise 0.5 --epochs 24 $some $fresh --sam --rho 0.2
lines label_noise.py --hidden 75-25 --noise 0.5 --epochs 24 $some $fresh --sam --rho 0.1

# 11. Other widths; two lower radii for 30-10, which learns nothing at 0.2 and 0.3
lines label_noise.py --hidden "3000-1000 30-10" --noise 0.5 --epochs 12 $some $three
both label_noise.py --hidden "3000-1000 30-10" --noise 0.5 --epochs "24 60" $some $three --rho "0.2 0.3"
lines label_noise.py --hidden 30-10 --noise 0.5 --epochs "24 60" $some $three --sam --rho "0.05 0.1"

# 12. All 55,000 images
lines label_noise.py --hidden "1200-400 300-100 75-25" --noise 0.5 --epochs "12 24" $all $three
both label_noise.py --hidden "1200-400 300-100 75-25" --noise 0.5 --epochs 60 $all $three --rho "0.2 0.3"

# 13. Fashion-MNIST
fashion=(label_noise.py --hidden "$widths" --dataset fashionmnist --weight-decay "0.0001 0.001" $some $three)
lines "${fashion[@]}" --noise 0.5 --epochs 12
both "${fashion[@]}" --noise 0.5 --epochs "24 60" --rho "0.01 0.02 0.05 0.1"

# 14 and 15. CIFAR-10, the paper's settings: half of the labels flipped
for filters in 16 4; do
    lines label_noise.py --filters $filters --noise 0.5 --epochs "200 100 50 25" $cifar
    lines label_noise.py --filters $filters --noise 0.5 --epochs "200 50" $cifar --sam --rho 0.1
done

# 16. CIFAR-10, the paper's settings: clean labels
lines resnet_width.py --filters "16 4" $cifar

# 17. Row 9's choices with its runs of 60 epochs, which came last, on fresh seeds
lines label_noise.py --hidden "300-100 150-50 75-25" --noise 0.5 --epochs 60 --weight-decay 0.003 $some $fresh
for item in 1200-400:0.3:0.001 300-100:0.3:0.001 150-50:0.1:0.003 75-25:0.1:0.003; do # width:rho:decay
    IFS=: read -r hidden rho decay <<<"$item"
    lines label_noise.py --hidden $hidden --noise 0.5 --epochs 60 --weight-decay $decay $some $fresh --sam --rho $rho
done

# 18. A decay above row 9's, which SGD and the narrow SAM chose the largest of; three seeds, so no candidate there
lines label_noise.py --hidden "$widths" --noise 0.5 --epochs "24 60" --weight-decay 0.006 $some $three
lines label_noise.py --hidden "$widths" --noise 0.5 --epochs 60 --weight-decay 0.006 $some $three --sam --rho "0.1 0.2"
