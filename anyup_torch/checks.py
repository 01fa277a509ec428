def check_inputs(*a): pass
