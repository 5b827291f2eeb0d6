# The bus on a real broker. KAFKA_BOOTSTRAP=host:port uses a cluster that runs already.

.PHONY: test-kafka
test-kafka: $(STAMP) ## the bus on a real Kafka broker (needs Java and Maven; or KAFKA_BOOTSTRAP)
	@# kafka-python leaves the sockets of failed connections to the garbage collector.
	CHARTER_TEST_KAFKA=1 $(PY) -m pytest tests/bus/test_conformance.py tests/kafka -q -m kafka \
	  -W ignore::ResourceWarning -W ignore::pytest.PytestUnraisableExceptionWarning

.PHONY: chaos
chaos: $(STAMP) ## kills, stops, restarts and cuts everything; prints what was lost or doubled
	$(PY) -m tests.kafka.chaos $(CHAOS)
