#!/bin/sh
# Lets NAME be what stands in the file that NAME_FILE names (of those in a folder `secrets`), then becomes the program:
# passwords stand neither in the command, where `ps` shows them, nor in compose.yaml.
set -eu
for name in $(env | sed -n 's|^\([A-Z_][A-Z0-9_]*\)_FILE=.*/secrets/[a-z0-9_]*$|\1|p'); do
    eval "file=\$${name}_FILE"
    value=$(cat "$file")
    export "$name=$value"
done
exec "$@"
