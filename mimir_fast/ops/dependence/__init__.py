"""What the dependence estimators (hsic, nhsic, cka, renyi_mi, hsic_test) are made of: kernel matrices and their sums."""
