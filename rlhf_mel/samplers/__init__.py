"""Better speech at inference, from the policy as it is."""
