"""What the dependence estimators (hsic, nhsic, cka, renyi_mi, hsic_test) share: kernel matrices and their sums."""
