#!/bin/sh
# Serves the search page of the champion: waits for a champion and a gallery, embeds the gallery, and deletes old downloads.
set -eu
folder=${TMPDIR:-/tmp}/smaller-student-search-$PORT
rm -rf "$folder"
until python -m pipeline pull --out "$folder/champion"; do sleep 30; done
until python -m pipeline index --gallery "$GALLERY" --model "$folder/champion/model.onnx" --out "$folder/index"; do
    sleep 30
done
exec python -m pipeline serve --index "$folder/index" --host "$LISTEN" --port "$PORT" --name localhost
