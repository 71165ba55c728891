# Everything runs in a virtual environment of its own, made on first use from the tested versions in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_VERBOSITY := error

.PHONY: demo studio studio-test test test-compat FORCE check bench bench-compile bench-gpu composition bench-kernels bench-load-memory bench-offload bench-parallel bench-slicing evidence clean help

help:
	@echo "make demo    accelerate the shipped tiny-flux pipeline, print the table, write the pictures to outputs/demo"
	@echo "make studio  a page that shows what is skipped and what it costs, at http://127.0.0.1:7860"
	@echo "make studio-test  the page in a headless Chromium (apt-get install chromium); screenshots to outputs/studio-shots"
	@echo "make test    static checks and the test suite"
	@echo "make test-compat  the tests that meet diffusers' insides, with diffusers 0.38 to 0.42.0 and a newer torch (an hour or two)"
	@echo "make render-faults  kill a batch render, a Ray actor and a Ray driver at random moments (minutes)"
	@echo "make bench-render  overhead, batches and equality of batch renders"
	@echo "make evidence  dynamics, captions and every preset, on every shipped pipeline (hours; PIPELINES=tiny-flux for one)"
	@echo "make seeds-tiny-dit  train two further seeds of a pipeline and record how results differ (an hour)"
	@echo "make bench   measure presets and rivals on tiny-flux (longer; results under pipelines/tiny-flux/results)"
	@echo "make bench-kernels  block-sparse kernels against dense attention, alone and in a model of 16384 tokens (20 minutes)"
	@echo "make bench-attention-tiny-flux  every rule of block-sparse attention on a shipped pipeline (a quarter of an hour)"
	@echo "make bench-weights-tiny-flux  every way to store weights in 2 to 4 bits, ours and rivals' (an hour)"
	@echo "make composition  every mechanism in every circumstance, the slow ones too, and its table (20 minutes)"
	@echo "make bench-compile  caches and torch.compile together, ours and rivals' (15 minutes)"
	@echo "make bench-offload  what is loaded and held while weights lie elsewhere, ours and rivals' (5 minutes)"
	@echo "make bench-parallel  gates on two processes that share one sequence, beside the rivals' (10 minutes)"
	@echo "make bench-gpu  kernels, caches, offload, compiling and quantised weights on a CUDA device (a quarter of an hour)"
	@echo "make bench-load-memory  peak memory of a FLUX-wide model quantised while it is loaded (15 minutes)"
	@echo "make bench-slicing  peak memory and time of a Wan-shaped model with its feed-forward layers in slices (10 minutes)"
	@echo "make bench-tiny-sd3  the same on another pipeline (ITEMS=8 pictures; half an hour)"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python demos/quickstart.py

$(VENV)/.installed-demo: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

STUDIO ?=
studio: $(VENV)/.installed-demo
	$(BIN)/python demos/studio.py $(STUDIO)

studio-test: $(VENV)/.installed-test
	mkdir -p outputs/studio-shots
	STUDIO_BROWSER=1 STUDIO_SHOTS=outputs/studio-shots $(BIN)/python -m pytest tests/studio/test_browser.py -s

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Two workers of one thread each, whole files at a time, so that what a file's tests share is made once.
test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The suite with other versions, each in an environment of its own, one package at a time away from constraints.txt.
COMPAT ?= diffusers-0.38.0 diffusers-0.39.0 diffusers-0.40.0 diffusers-0.41.0 diffusers-0.42.0 torch-2.14.1
COMPAT_TESTS ?= tests/test_session.py tests/test_pipelines.py tests/test_calls.py tests/denoiser tests/quantization \
	tests/attention/test_route.py tests/render/test_render.py \
	tests/composition/test_context_parallel.py tests/composition/test_from_pipe.py
COMPAT_FREE := transformers|tokenizers|huggingface_hub|hf-xet|triton|setuptools
test-compat: $(COMPAT:%=.compat/%/.tested)

.compat/%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .compat/$*
	grep -vE "^($(firstword $(subst -, ,$*))|$(COMPAT_FREE))==" constraints.txt > .compat/$*/constraints.txt
	echo $(subst -,==,$*) >> .compat/$*/constraints.txt
	.compat/$*/bin/python -m pip install --quiet --disable-pip-version-check -c .compat/$*/constraints.txt -e '.[test]'
	touch $@

.compat/%/.tested: .compat/%/.installed FORCE
	.compat/$*/bin/python -m pytest -n 2 --dist loadfile $(COMPAT_TESTS)
	touch $@

FORCE:

bench: $(VENV)/.installed-bench
	$(MAKE) bench-tiny-flux ITEMS=32
	$(BIN)/python -m dit_accel.bench.overhead pipelines/tiny-flux --out pipelines/tiny-flux/results

ITEMS ?= 8
bench-tiny-%: $(VENV)/.installed-bench
	for guidance in 1 3; do $(BIN)/python -m dit_accel.bench.curves pipelines/tiny-$* --guidance $$guidance \
		--items $(ITEMS) --out pipelines/tiny-$*/results || exit 1; done

# Rules of block-sparse attention on a shipped pipeline; the CPU kernel against dense attention; a model of 16k tokens.
bench-attention-%: $(VENV)/.installed-bench
	$(BIN)/python -m dit_accel.bench.attention pipelines/$* --items $(ITEMS) --out pipelines/$*/results

# Every way to store weights in 2 to 4 bits, on a shipped pipeline; goes on where it was interrupted.
bench-weights-%: $(VENV)/.installed-bench
	$(BIN)/python -m dit_accel.bench.weights pipelines/$* --items $(ITEMS) --steps 20 --runs 32 \
		--out pipelines/$*/results

# The kernels and whole models on a CUDA device.
bench-gpu: $(VENV)/.installed-bench
	$(BIN)/python kernels/benchmarks/gpu.py --out docs/results/gpu-kernels.json
	$(BIN)/python -m dit_accel.bench.gpu --out docs/results

# Gates on two processes that share one sequence, ours and the rivals'.
bench-parallel: $(VENV)/.installed-bench
	$(BIN)/python -m dit_accel.bench.parallel --out docs/results/parallel.json

# Peak memory of a FLUX-wide model that is quantised while it is loaded.
bench-load-memory: $(VENV)/.installed-bench
	$(BIN)/python -m dit_accel.bench.load_memory

# Peak memory and time of a Wan-shaped model of 16384 tokens, its feed-forward layers whole and in slices.
bench-slicing: $(VENV)/.installed-bench
	$(BIN)/python -m dit_accel.bench.slicing --out docs/results/slicing.json

# Caches and torch.compile together, beside cache-dit and diffusers' caches.
bench-compile: $(VENV)/.installed-bench
	$(BIN)/python -m dit_accel.bench.compile --out docs/results

# Caches and offload together, beside cache-dit and diffusers' caches: blocks loaded, features held, time.
bench-offload: $(VENV)/.installed-bench
	OMP_NUM_THREADS=1 $(BIN)/python -m dit_accel.bench.offload --out docs/results

# Every mechanism in every circumstance; writes docs/results/composition.json and the table in docs/composition.md.
composition: $(VENV)/.installed-test $(VENV)/.installed-bench
	$(BIN)/python -m dit_accel.testing.composition

bench-kernels: $(VENV)/.installed-bench
	$(BIN)/python kernels/benchmarks/block_sparse_attention.py
	$(BIN)/python kernels/benchmarks/vq_linear.py
	for threads in 1 2; do $(BIN)/python -m dit_accel.bench.sparse_speed --threads $$threads --out docs/results || exit 1; done

gates-%: $(VENV)/.installed
	$(BIN)/python pipelines/training/gates.py pipelines/$* --out pipelines/gates/$*.safetensors

PIPELINES ?= tiny-flux tiny-sd3 tiny-dit tiny-wan
CLASSIFIER = pipelines/$(if $(findstring wan,$(1)),shapes,fashion)-classifier

# What is recorded of one pipeline folder: $(1), whose classifier is that of the pipeline named $(2).
define record
	$(BIN)/python -m dit_accel.bench.dynamics $(1)
	$(BIN)/python -m dit_accel.bench.captions $(1) --classifier $(call CLASSIFIER,$(2)) $(CAPTIONS)
	for policy in $(3); do $(BIN)/dit-accel compare $(1) --policy $$policy --prompts-file $(1)/prompts.txt \
		--seeds 0:$$(wc -l < $(1)/prompts.txt) --paired --classifier $(call CLASSIFIER,$(2)) --threads 2 \
		--out $(1)/results/compare-$$policy || exit 1; done
endef

evidence: $(addprefix evidence-,$(PIPELINES))

evidence-%: $(VENV)/.installed-bench
	$(call record,pipelines/$*,$*,quality balanced fast)

train-%: $(VENV)/.installed
	$(BIN)/python pipelines/$(*:-$(lastword $(subst -, ,$*))=)/train.py --bf16 --compile --seed $(lastword $(subst -, ,$*)) \
		--work runs/$* --out runs/$*-out

seeds-%: $(VENV)/.installed-bench
	for seed in 1 2; do $(MAKE) train-$*-$$seed || exit 1; done
	$(call record,runs/$*-1-out,$*,balanced)
	$(call record,runs/$*-2-out,$*,balanced)
	$(BIN)/python -m dit_accel.bench.seeds pipelines/$* runs/$*-1-out runs/$*-2-out

# Faults and figures of batch rendering; what is killed and measured: docs/rendering.md.
$(VENV)/.installed-ray: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	touch $@

render-faults: $(VENV)/.installed-ray
	$(BIN)/python -m dit_accel.bench.render_faults pipelines/tiny-flux --kills 60 --out docs/results

bench-render: $(VENV)/.installed-ray
	$(BIN)/python -m dit_accel.bench.render pipelines/tiny-flux --prompts pipelines/tiny-flux/prompts.txt --out docs/results
	$(BIN)/python -m dit_accel.bench.render pipelines/tiny-wan --prompts pipelines/tiny-wan/prompts.txt --items 12 \
		--batches 1 2 4 --rounds 3 --out docs/results

clean:
	rm -rf $(VENV) outputs
