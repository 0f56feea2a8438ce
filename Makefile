# VENV may be shared by several clones.
VENV ?= .venv
PYTHON ?= python3
LOCK := $(shell cksum < requirements.lock | cut -d ' ' -f 1)
STAMP := $(VENV)/.installed-$(LOCK)

export PATH := $(abspath $(VENV))/bin:$(PATH)
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: setup demo evidence test test-stack lint docs docs-pictures deploy stack up down ui lock clean

# The environment with this checkout's command (a shared environment may have that of another clone). The lock file is
# complete, so --no-deps keeps pip from resolving (older pips install an unlocked release for packages with extras).
setup: $(STAMP)
	@[ "$$(cat $(VENV)/.checkout 2>/dev/null)" = "$(CURDIR)" ] || { \
	    python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . && \
	    echo "$(CURDIR)" > $(VENV)/.checkout; }

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is required; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	touch $@

demo: setup
	python -m dvc repro
	python -m pipeline compare

# Takes hours, in DVC's queue; run it again to resume after an interruption.
evidence: setup
	python -m pipeline preset evidence
	python -m benchmarks.evidence

# Two processes with one thread each: torch threads that share a core slow each other down by busy waiting.
test: setup
	OMP_NUM_THREADS=1 python -m pytest -m "not stack" -n 2 --dist loadfile

test-stack: setup
	python -m pytest -m stack

lint: setup
	python -m ruff check .
	python -m ruff format --check .
	python -m mypy
	hadolint docker/Dockerfile
	check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml docker/compose.gpu.yaml

docs: setup
	python -m docs.make_params

# From real runs, in a temporary copy of this checkout; minutes if `make demo` has run, since DVC's cache is shared.
docs-pictures: setup
	python -m docs.make_pictures

# Create the work pool, schedules and automation for lost runs on the server at PREFECT_API_URL.
deploy: setup
	python -m pipeline.flow.deploy

# MLflow, Prefect, a worker and the search page for one user (Procfile); Ctrl-C stops all. `make stack MLFLOW_PORT=5001`.
# The import of `pipeline` sets NO_PROXY for this machine, if there is a proxy.
stack: export MLFLOW_PORT ?= 5000
stack: export PREFECT_PORT ?= 4200
stack: export SEARCH_PORT ?= 8000
stack: export MLFLOW_TRACKING_URI = http://127.0.0.1:$(MLFLOW_PORT)
stack: export MLFLOW_SERVER_ENABLE_JOB_EXECUTION = false
stack: export PREFECT_API_URL = http://127.0.0.1:$(PREFECT_PORT)/api
stack: export PREFECT_HOME = $(CURDIR)/.stack/prefect
stack: export GALLERY ?= artifacts/prepare/vehicles/image_test
stack: setup
	mkdir -p .stack
	@echo "MLflow $$MLFLOW_TRACKING_URI, Prefect $${PREFECT_API_URL%/api}, search page http://127.0.0.1:$$SEARCH_PORT"
	python -c 'import pipeline, honcho.command as honcho; honcho.main()' start

-include docker/.env

# The same as containers, with PostgreSQL and passwords (docker/compose.yaml); they run as the owner of the checkout.
# TARGET=gpu gives the worker access to NVIDIA GPUs.
COMPOSE = docker compose -f docker/compose.yaml $(if $(filter gpu,$(TARGET)),-f docker/compose.gpu.yaml)
OWNER = $(shell ls -nd . | awk '{print $$$(1)}')

up:
	@[ "$(call OWNER,3)" != 0 ] || { echo "The checkout belongs to root, but containers do not run as root; run: chown -R USER ."; exit 2; }
	sh docker/make-secrets.sh
	HOST_UID=$(call OWNER,3) HOST_GID=$(call OWNER,4) $(COMPOSE) up --build --detach

down:
	$(COMPOSE) --profile s3 down

ui: setup
	python -m mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000 --workers 1

lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --extra dev --extra stack --custom-compile-command "make lock" -o requirements.lock pyproject.toml

clean:
	rm -rf .checkpoints .tracking .stack timings mlflow.db* mlartifacts artifacts .pytest_cache .hypothesis .mypy_cache .ruff_cache
