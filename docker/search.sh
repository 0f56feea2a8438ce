#!/bin/sh
# The search page of the champion: waits until there is one, embeds the gallery, serves.
set -eu
folder=$(mktemp -d)
until python -m pipeline pull --out "$folder/champion"; do sleep 30; done
python -m pipeline index --gallery "$GALLERY" --model "$folder/champion/model.onnx" --out "$folder/index"
exec python -m pipeline serve --index "$folder/index" --host "$LISTEN" --port "$PORT" --name localhost
