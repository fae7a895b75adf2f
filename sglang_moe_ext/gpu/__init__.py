"""What is known of each GPU: limits, rates, and the time that a roofline gives."""
