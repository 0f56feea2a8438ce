#!/bin/sh
# For each variable NAME_FILE with a path in a folder `secrets`, sets NAME to the content of the file; then runs the program.
# So passwords appear neither in the command, where `ps` would show them, nor in compose.yaml.
# It also adds the services to the list of hosts for which Docker's proxy is not used; `*`, every host, is understood alone only.
set -eu
hosts=${no_proxy:-${NO_PROXY:-}}
[ "$hosts" = "*" ] || hosts=${hosts:+$hosts,}mlflow,prefect,s3,localhost,127.0.0.1,::1
export NO_PROXY="$hosts" no_proxy="$hosts"
for name in $(env | sed -n 's|^\([A-Z_][A-Z0-9_]*\)_FILE=.*/secrets/[a-z0-9_]*$|\1|p'); do
    eval "file=\$${name}_FILE"
    value=$(cat "$file")
    export "$name=$value"
done
exec "$@"
