# make demo: the main job on real input.  make test: the tests.  make check: style and types.  make wheel: dist/*.whl.
.PHONY: setup demo test check wheel lock clean

BIN := .venv/bin

setup: .venv/.done

.venv/.done: requirements.lock pyproject.toml .ci/setup
	@.ci/setup
	@touch $@

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" examples/openclipart/demo.sh

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
