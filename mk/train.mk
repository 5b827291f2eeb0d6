# Training: parity with TRL's last PPO, and speed beside it. TRL 1.12.0 lives in an environment of its own,
# since TRL dropped PPO in 1.13 and ours follows the newer releases.
TRL_PPO_VENV ?= .cache/trl-1.12
TRL_PPO_STAMP := $(TRL_PPO_VENV)/.installed

$(TRL_PPO_STAMP): | $(STAMP)
	@echo "Installing TRL 1.12.0 into $(TRL_PPO_VENV) (once; it shares torch's files with uv's cache) ..."
	@test -x $(TRL_PPO_VENV)/bin/python || $(UV) venv -q --python $(PY) $(TRL_PPO_VENV)
	@$(UV) pip install -q --python $(TRL_PPO_VENV)/bin/python trl==1.12.0 \
	  $$($(PY) -c 'from importlib.metadata import version as v; print(*(f"{p}=={v(p)}" for p in ("torch", "transformers", "accelerate")))')
	@touch $@

.PHONY: parity
parity: $(TRL_PPO_STAMP) ## our PPO against TRL 1.12.0's on the same frozen rollouts
	$(PY) bench/parity/compare.py --trl $(TRL_PPO_VENV)/bin/python

.PHONY: bench-trainer
bench-trainer: $(TRL_PPO_STAMP) ## tokens per second in the update, ours and TRL 1.12.0's
	$(PY) bench/trainer.py --trl $(TRL_PPO_VENV)/bin/python
