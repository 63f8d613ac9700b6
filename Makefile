# make demo: from real image-text pairs to an evaluated encoder.  make ablations: the paper's tables at the demo's size.
# make test: the tests.  make check: formatter, linter, type checker.  make wheel: dist/*.whl.
# make picture: docs/example.png, the picture of the README.
.PHONY: setup demo ablations picture test check wheel lock clean

BIN := .venv/bin

setup: .venv/.done

.venv/.done: requirements.lock pyproject.toml .ci/setup
	@.ci/setup
	@touch $@

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" examples/openclipart/demo.sh

# Resumable: run it again after an interruption.
ablations: setup
	@$(BIN)/python examples/openclipart/make_shards.py --out demo/data --cache demo/cache
	@$(BIN)/python examples/openclipart/ablations.py --data demo/data --out demo/ablations

# 128 colours keep the file below 50 KB.
picture: demo
	@$(BIN)/preprocess explain demo/out 000000010095 --png docs/example.png
	@$(BIN)/python -c 'from PIL import Image; f = "docs/example.png"; Image.open(f).convert("RGB").quantize(128).save(f, optimize=True)'

test: setup
	@$(BIN)/python -m pytest --numprocesses auto --dist loadfile

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --warnings

wheel: setup
	@rm -rf build
	@$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

# After a change of version ranges in pyproject.toml: install them and write the exact versions to requirements.lock.
lock: setup
	@$(BIN)/pip install --quiet --editable '.[train,evals,onnx,ffcv,ray,s3,sentencepiece,demo,dev]'
	@$(BIN)/pip freeze --exclude-editable > requirements.lock

clean:
	@rm -rf .venv demo build dist *.egg-info
