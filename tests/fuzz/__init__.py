"""Fuzzers of every reader of files that others wrote: valid documents of our own, changed at random, by seed.

mutate      what a case changes: the structure of a document, or its bytes
readers     the table of readers, each with valid documents and the public door that reads them
campaign    runs cases in a child process under a watchdog and says what is a finding
"""
