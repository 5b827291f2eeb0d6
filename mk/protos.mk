# Messages lie in logs for months: no schema may change in a way that a reader of the last release cannot read.
# After a release: node_modules/.bin/buf build protos --exclude-source-info -o protos/released/VERSION.binpb
RELEASED := $(lastword $(sort $(wildcard protos/released/*.binpb)))

.PHONY: buf-breaking
buf-breaking: node_modules/.bin/buf ## the schemas against those of the last release
	@node_modules/.bin/buf breaking protos --against '$(RELEASED)'
	@# A check that cannot fail proves nothing: a field of another type must be refused.
	@broken=$$(mktemp -d) && trap 'rm -rf "$$broken"' EXIT && cp -r protos/. "$$broken" && \
	  sed -i.bak '0,/string prompt_id = /s//int64 prompt_id = /' "$$broken/charter/v1/events.proto" && \
	  ! cmp -s protos/charter/v1/events.proto "$$broken/charter/v1/events.proto" && \
	  ! node_modules/.bin/buf breaking "$$broken" --against '$(RELEASED)' >/dev/null || \
	  { echo "buf breaking lets a changed field pass; look at protos/buf.yaml and $(RELEASED)"; exit 1; }
