#!/usr/bin/env bash
# Runs the commands of the documentation that need no network, as a newcomer would, in an empty directory:
#
#   bash docs/check_commands.sh            as they are written
#   bash docs/check_commands.sh --quick    with trainings of one or two epochs, and without the longest: as CI does;
#                                          the notebooks run in full
#
# The extras `test` and `notebooks` must be installed. Every command is looked up on its page first, so that neither can
# change without the other.
set -euo pipefail
docs=$(cd "$(dirname "$0")" && pwd)
quick=${1:-}
command -v jupytext >/dev/null || { echo 'no jupytext: pip install ".[test,notebooks]"' >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export JAX_COMPILATION_CACHE_DIR=$work/compiled COLUMNS=100
# Notebooks run without the settings of the user, and leave nothing in the home directory.
export IPYTHONDIR=$work/ipython JUPYTER_CONFIG_DIR=$work/jupyter JUPYTER_DATA_DIR=$work/jupyter \
    JUPYTER_RUNTIME_DIR=$work/jupyter/runtime

# on PAGE COMMAND [EXTRA...]: runs a command of a page, with EXTRA where it is to be quick. What the page leaves open,
# and other names that have to change, is replaced by the variable of that name.
on() {
    local page=$docs/$1 command=$2 name
    if [[ $(<"$page") != *"$command"* ]]; then
        echo "docs/$1 does not say: $command" >&2
        exit 1
    fi
    for name in DATA DIR WEIGHTS RUN binaryvit_small; do
        if [[ -n ${!name:-} ]]; then command=${command//$name/${!name}}; fi
    done
    if [[ -n $quick ]]; then command+="${*:3}"; fi
    printf '\n--- docs/%s: %s\n' "$1" "$command"
    bash -euo pipefail -c "$command"
}

# The same for a command that takes too long to be quick.
long() { if [[ -z $quick ]]; then on "$@"; fi; }

# --- the first run -------------------------------------------------------------------------------
on index.md 'bvit train --config=digits --workdir=runs/digits' ' --config.epochs=2'
on index.md 'bvit eval --workdir=runs/digits'
on faq.md 'bvit --version'

# --- what it has learned -------------------------------------------------------------------------
long training.md 'bvit train --config=deit_digits --workdir=runs/deit_digits'
long reports.md 'bvit report curves runs/deit_digits runs/digits --output curves.png'
on reports.md 'bvit report network --checkpoint=runs/digits --output=network'
on cost.md 'bvit report cost --checkpoint=runs/digits'
on cost.md 'bvit report cost --config=digits --config.model.act_bits=32 --json' ' > cost.json'
on cost.md 'bvit report cost --config=binaryvit_small' ' --depth=1'
on cost.md 'bvit report capability --all' ' > capability.txt'
on cost.md 'bvit report table' ' > table.md'
on settings.md 'bvit report settings' ' > settings.md'

# --- its bits ------------------------------------------------------------------------------------
python - <<'PYTHON'
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
for number, (image, label) in enumerate(zip(digits.images[:300], digits.target[:300])):
    folder = Path("pictures") / ("val" if number % 5 == 0 else "train") / f"digit {label}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 15.9).astype(np.uint8)).resize((32, 32)).save(folder / f"{number}.png")
PYTHON
mkdir -p models
cp pictures/val/*/0.png photo.jpg
cp -r runs/digits runs/binaryvit # any run will do
on packed.md 'bvit export runs/binaryvit models/packed'
on packed.md 'bvit predict --checkpoint models/packed photo.jpg'
on packed.md 'bvit export runs/binaryvit models/program --format stablehlo'
DATA=$work/data binaryvit_small=digits on packed.md \
    'bvit export runs/binaryvit models/half --half --config=binaryvit_small --config.data.data_dir=DATA'

# --- PyTorch -------------------------------------------------------------------------------------
if python -c 'import torch' 2>/dev/null; then
    on pytorch.md 'bvit convert runs/digits digits.pth --format=reference'
fi
(cd "$docs/.." && bvit parity check tests/golden/{react_deit,bivit_swin}.npz)

# --- other data ----------------------------------------------------------------------------------
WEIGHTS=runs/digits DIR=$work/pictures RUN=runs/finetuned \
    on training.md 'bvit train --config=finetune:folder=DIR,init=WEIGHTS --workdir=RUN' ' --config.epochs=2'
on imagenet.md 'python -m bvit_jax.data.mini_imagenet --out mini'
on imagenet.md 'bvit prepare imagenet2012 --tars mini --expect train=2000,validation=500 --data_dir mini_tfds'
long imagenet.md \
    'bvit train --config=imagenet_mini:teacher --workdir=runs/mini_teacher --config.data.data_dir=mini_tfds'

# --- the other models, and what they cost --------------------------------------------------------
long bhvit.md 'bvit train --config=bhvit_digits --workdir=runs/bhvit_digits'
long bivit.md 'bvit train --config=bivit_digits --workdir=runs/bivit_digits'
on training.md 'bvit plan --config=digits' ' > plan.json'

# --- the notebooks -------------------------------------------------------------------------------
for page in "$docs"/examples/*.md; do
    printf '\n--- docs/examples/%s, executed as a notebook\n' "${page##*/}"
    mkdir -p "notebooks/$(basename "$page" .md)"
    cp "$page" "notebooks/$(basename "$page" .md)"
    (cd "notebooks/$(basename "$page" .md)" && time jupytext --set-kernel python3 --to ipynb --execute "${page##*/}")
done

echo
echo "all commands work"
