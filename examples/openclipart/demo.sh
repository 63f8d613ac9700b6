#!/usr/bin/env bash
# The demo, with the commands that a user would type. Finished steps are skipped when it runs again.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/openclipart
config="$here/demo.yaml"

step() { printf '\n== %s\n' "$*"; }

step "1/6 shards: public-domain clip art with its captions"
python "$here/make_shards.py" --out demo/data --cache demo/cache

step "2/6 labels, IDF and betons: preprocess build-labels demo/data/train"
preprocess build-labels demo/data/train --config "$config"
preprocess verify demo/out

step "3/6 SQL on the IDF table"
sql() { printf '%s\n' "$1"; preprocess sql demo/out "$1"; }
sql "SELECT token, document_frequency, idf FROM tokens ORDER BY document_frequency DESC LIMIT 5"
sql "SELECT token, document_frequency, idf FROM tokens WHERE token IN ('tree</w>', 'car</w>', 'penguin</w>')
ORDER BY idf"
sql "SELECT len(label_ids) AS labels, count(*) AS captions FROM labels GROUP BY 1 ORDER BY 2 DESC LIMIT 5"

# On CPUs torch's fused attention in bf16 is slower than plain matrix products for few tokens (275 against 350 img/s).
export TIMM_FUSED_ATTN=0

step "4/6 pre-training by classification: train run --beton"
train run --beton --config "$config"

step "5/6 linear probe on the held-out drawings"
if [ ! -f demo/probe.json ] || [ demo/run/config.yaml -nt demo/probe.json ]; then
    train probe --train demo/data/train --test demo/data/test --config "$config" --cache demo/features \
        --encoder pixels:8 --encoder untrained:demo/run --encoder run:demo/run --out demo/probe.json
else
    echo "done already: demo/probe.json"
fi

step "6/6 summary"
python "$here/summary.py" --out demo/out --run demo/run --probe demo/probe.json --plots demo
