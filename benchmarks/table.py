"""The benchmarks by name. A new one is one file with an ENTRY, and a word in this list."""

from benchmarks import amber, mathvista, mmbench, mmvu, pope, videohallucer, videommmu

MODULES = (pope, mmbench, mathvista, mmvu, videommmu, videohallucer, amber)
TABLE = {module.ENTRY.name: module.ENTRY for module in MODULES}
