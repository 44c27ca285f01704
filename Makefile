# make demo: MoCo v2 on the embedded textures, its probe, a picture of the curves; about three minutes on two cores.
# make test: the test suite. Both make a virtual environment first (several GB: PyTorch's usual build).
PYTHON ?= python3
VENV ?= .venv
DEMO = runs/moco_v2-textures-table1

demo: $(VENV)/ready
	$(VENV)/bin/python moco_v2.py
	$(VENV)/bin/python linear_probe.py --quick --encoder random $(DEMO)/checkpoint.pt
	@echo "curves: $(DEMO)/curves.png"

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.PHONY: demo test
