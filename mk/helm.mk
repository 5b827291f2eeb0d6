# The Helm chart. HELM=path uses a Helm that is there already.
HELM_VERSION := v3.22.0
HELM ?= $(or $(shell command -v helm),.tools/bin/helm)

.tools/bin/helm:
	@command -v go >/dev/null || { echo "Helm is missing, and so is Go, which would build it; install one of them."; exit 1; }
	GOBIN='$(CURDIR)/.tools/bin' go install helm.sh/helm/v3/cmd/helm@$(HELM_VERSION)

.PHONY: test-helm
test-helm: $(STAMP) $(HELM) ## the chart, rendered by Helm (or Go, which builds it)
	CHARTER_TEST_HELM='$(abspath $(HELM))' $(PY) -m pytest tests/helm -q
