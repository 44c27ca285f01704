# make demo: train MoCo v2 on the built-in textures, probe it, and plot its curves. This takes about
#            three minutes on two cores after the installation.
# make test: run the test suite.
# Both first create a virtual environment with PyTorch's usual build (several GB).
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
