# make demo: the main job on real input.  make ablations: the paper's tables at the demo's size.
# make test: the tests.  make check: style and types.  make wheel: dist/*.whl.
.PHONY: setup demo ablations test check wheel lock clean

BIN := .venv/bin

setup: .venv/.done

.venv/.done: requirements.lock pyproject.toml .ci/setup
	@.ci/setup
	@touch $@

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" examples/openclipart/demo.sh

# Killed, the same command goes on with what is missing.
ablations: setup
	@$(BIN)/python examples/openclipart/make_shards.py --out demo/data --cache demo/cache
	@$(BIN)/python examples/openclipart/ablations.py --data demo/data --out demo/ablations

test: setup
	@$(BIN)/python -m pytest --numprocesses auto --dist loadfile

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --warnings

wheel: setup
	@rm -rf build
	@$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

# After changing a range in pyproject.toml: the exact versions that .venv holds become the lock.
lock: setup
	@$(BIN)/pip install --quiet --editable '.[train,evals,onnx,ffcv,ray,s3,sentencepiece,demo,dev]'
	@$(BIN)/pip freeze --exclude-editable > requirements.lock

clean:
	@rm -rf .venv demo build dist *.egg-info
