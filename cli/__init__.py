"""The command line: parse, call one function of lrsd, print. Installed as `lrsd_cli`."""
