# The targets forward to ./dev. Arguments: make test ARGS="-k budget"
.DEFAULT_GOAL := help
.PHONY: help demo test check fmt bench docs lock

help:
	@./dev

demo test check fmt bench docs lock:
	@./dev $@ $(ARGS)
