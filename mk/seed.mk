# The shipped model, from its recipe.
.PHONY: seed-model
seed-model: $(STAMP) ## the shipped model anew from its recipe: about an hour on one core, the same bytes each time
	@OMP_NUM_THREADS=1 $(PY) -m charter.seedmodel.recipe

.PHONY: eval-seed
eval-seed: $(STAMP) ## measures the shipped model's five tasks against their targets; ARGS= goes to `charter eval seed`
	@OMP_NUM_THREADS=1 $(CHARTER) eval seed $(ARGS)
