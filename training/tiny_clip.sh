#!/usr/bin/env bash
# Makes dataengine/models/tiny_clip from nothing: demo videos of another seed than the default's, their
# frames and measured captions, then the clip_tiny recipe. About 20 minutes on two cores.
#   bash training/tiny_clip.sh [FOLDER for what lies between, default out/tiny_clip]
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-out/tiny_clip}
python=.venv/bin/python

"$python" -m dataengine demo "$work/demo" --num-videos 500 --seed 7
"$python" -m dataengine ingest pipelines/tiny_clip.yaml --sources "$work/demo/videos" --corpus "$work/corpus"
"$python" -m training clip_tiny --data "$work/corpus" --output "$work/run"
"$python" -m training.export "$work/run" dataengine/models/tiny_clip --half
