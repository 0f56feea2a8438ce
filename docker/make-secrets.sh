#!/bin/sh
# Creates the missing passwords in a folder: random, and readable by their owner only. If root runs it, they belong to the
# owner of the parent folder, who runs the containers.
set -eu
umask 077
folder=${1:-docker/secrets}
mkdir -p "$folder"
random() { head -c 24 /dev/urandom | base64 | tr '+/' '-_'; }
for name in postgres mlflow mlflow_session s3; do
    [ -s "$folder/$name" ] || random > "$folder/$name"
done
[ -s "$folder/prefect" ] || echo "admin:$(random)" > "$folder/prefect"
[ -s "$folder/s3_config" ] || cat > "$folder/s3_config" <<JSON
{"identities": [{"name": "stack", "actions": ["Admin"],
  "credentials": [{"accessKey": "stack", "secretKey": "$(cat "$folder/s3")"}]}]}
JSON
if [ "$(id -u)" = 0 ]; then
    chown -R "$(ls -nd "$(dirname "$folder")" | awk '{print $3 ":" $4}')" "$folder"
fi
