"""Sealed namespace, libvirt, network, guest channels, baselines and reset, ledger, warden."""
