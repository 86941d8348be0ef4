"""What data-centre and workstation Blackwell (sm100, sm120) share."""
